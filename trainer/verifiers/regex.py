"""regex: the completion matches a pattern, of the options or of the row."""

import re
from typing import Any

from trainer.verifiers.verdict import Verdict, field


def verify(fields: dict[str, Any], completion: str, options: dict[str, Any]) -> Verdict:
    """1 if the pattern matches all of the completion (`match=fullmatch`), or a part of it (`search`).

    Raises re.error for a bad pattern of the row.
    """
    key = options["pattern_key"]
    pattern = re.compile(str(field(fields, key)) if key else options["pattern"])
    found = pattern.search(completion) if options["match"] == "search" else pattern.fullmatch(completion)
    return Verdict(1, "matches") if found else Verdict(0, "does not match")
