"""`python -m slurm.logs [-f] RUN_DIR [RANK]`: the log of its jobs, or a rank's newest log. Torch-free."""

import argparse
import os
import sys
from pathlib import Path

from trainer.settings.command import tells_mistakes
from trainer.settings.run_folder import pasted, read_state


@tells_mistakes
def main(arguments: list[str]) -> int:
    """Run tail in place of this process; -f follows the log, also after a requeue."""
    parser = argparse.ArgumentParser(prog="python -m slurm.logs", description=__doc__)
    parser.add_argument("-f", action="store_true", dest="follow")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("rank", type=int, nargs="?")
    options = parser.parse_args(arguments)
    run_dir, follow, log = options.run_dir, options.follow, options.run_dir / "logs" / "job.log"
    if options.rank is not None:
        log = run_dir / "logs" / f"attempt-{read_state(run_dir)['attempt']}" / f"rank-{options.rank}.log"
    if not log.is_file() and not (follow and log.parent.is_dir()):
        print(f"{log} does not exist: see python -m slurm.status {pasted(run_dir)}", file=sys.stderr)
        return 2
    os.execvp("tail", ["tail", "-n", "+1", *(["-F"] if follow else []), "--", str(log)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
