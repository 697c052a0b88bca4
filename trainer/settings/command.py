"""What every command does with a mistake of its user. Torch-free."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from data_pipeline.config import DataError
from moe.config import ConfigError

P = ParamSpec("P")


def tells_mistakes(command: Callable[P, int | None], headline: str = "") -> Callable[P, int | None]:
    """`command`, which returns 2 where the configuration or the data is wrong, after the message alone."""

    @wraps(command)
    def telling(*args: P.args, **kwargs: P.kwargs) -> int | None:
        try:
            return command(*args, **kwargs)
        except (ConfigError, DataError) as error:
            print(f"{headline}{error}", file=sys.stderr)
            return 2

    return telling
