"""`python -m trainer.report RUN_DIR|SWEEP...`: report whether runs learn, are balanced and are fast.

Writes a page and pictures from run folders alone, also of running or crashed runs, with or without W&B.
"""

import argparse
import sys
from pathlib import Path

from moe.config import ConfigError
from trainer.monitor.report import find_runs, write_report


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.report", description=__doc__)
    parser.add_argument("paths", type=Path, nargs="+", help="run folders, or folders of run folders")
    parser.add_argument("--out", type=Path, help="default: report/ in the folder; ./report for several")
    options = parser.parse_args(arguments)
    try:
        out = options.out or (options.paths[0] if len(options.paths) == 1 else Path()) / "report"
        print(f"report: {write_report(find_runs(options.paths), out)}")
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
