"""The code of a run, copied when it is submitted: later edits do not change a queued job. Torch-free."""

import shutil
import subprocess
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_PACKAGES = ("trainer", "moe", "data_pipeline", "slurm", "conf")


def snapshot(target: Path, root: Path = _ROOT) -> None:
    """Copy the code of `root` into `target` as it lies there: committed, changed and new files alike.

    In a git checkout these are the files that git does not ignore; an installed package is copied whole.
    """
    shutil.rmtree(target, ignore_errors=True)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_PACKAGES]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout
    if not listed:
        for package in _PACKAGES:
            no_cache = shutil.ignore_patterns("__pycache__")
            shutil.copytree(root / package, target / package, ignore=no_cache)
    for file in filter(None, listed.split("\0")):
        if (root / file).is_file():  # not: deleted, but not committed so
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / file, target / file)
