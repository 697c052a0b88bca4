"""`python -m slurm.logs [-f] RUN_DIR [RANK]`: the log of its jobs, or the newest of a rank. Torch-free."""

import os
import sys
from pathlib import Path

from trainer.run_folder import read_state


def main(arguments: list[str]) -> int:
    """Hand over to tail; -f follows, also over a requeue."""
    follow = "-f" in arguments
    words = [word for word in arguments if word != "-f"]
    if len(words) not in (1, 2) or (len(words) == 2 and not words[1].isdigit()):
        print("usage: python -m slurm.logs [-f] RUN_DIR [RANK]", file=sys.stderr)
        return 2
    run_dir = Path(words[0])
    log = run_dir / "logs" / "job.log"
    if len(words) == 2:
        log = run_dir / "logs" / f"attempt-{read_state(run_dir)['attempt']}" / f"rank-{words[1]}.log"
    if not log.is_file() and not (follow and log.parent.is_dir()):
        print(f"{log} does not exist: see python -m slurm.status {run_dir}", file=sys.stderr)
        return 2
    os.execvp("tail", ["tail", "-n", "+1", *(["-F"] if follow else []), str(log)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
