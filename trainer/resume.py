"""`python -m trainer.resume RUN_DIR`: go on with a run on this machine."""

import sys
from pathlib import Path

from data_pipeline.config import DataError
from trainer.cli import check_data, start
from trainer.config import ConfigError, RunConfig
from trainer.parallel import ParallelPlan
from trainer.run_folder import lock


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m trainer.resume RUN_DIR", file=sys.stderr)
        return 2
    run_dir = Path(arguments[0])
    try:
        config = RunConfig.of_run(run_dir)
        config.check(ParallelPlan.of(config, config.parallel.nproc_per_node))
        check_data(config)
        return start(run_dir, config, lock(run_dir))
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
