"""`python -m trainer.resume RUN_DIR [key=value ...]`: go on with a run here, also laid out anew."""

import sys
from pathlib import Path

from trainer.cli import check_data, start
from trainer.settings.command import tells_mistakes
from trainer.settings.config import RunConfig
from trainer.settings.parallel import ParallelPlan
from trainer.settings.run_folder import change_layout, lock, read_run, record_layout


@tells_mistakes
def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    if not arguments:
        print("usage: python -m trainer.resume RUN_DIR [key=value ...]", file=sys.stderr)
        return 2
    run_dir, overrides = Path(arguments[0]), arguments[1:]
    cfg = read_run(run_dir)
    changed = change_layout(cfg, overrides)
    config = RunConfig.load(cfg)
    config.check(ParallelPlan.of(config, config.parallel.nproc_per_node))
    check_data(config)
    held = lock(run_dir)
    recorded = [record_layout(run_dir, changed, overrides)] if changed else []
    return start(run_dir, config, held, recorded)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
