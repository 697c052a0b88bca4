"""The code of a run, copied when it is submitted: later edits do not change a queued job. Torch-free."""

import shutil
import subprocess
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_PACKAGES = ("trainer", "moe", "data_pipeline", "slurm", "conf")


def snapshot(target: Path) -> None:
    """Copy the code that runs into `target`, as it lies here: committed, changed and new files alike.

    In a git checkout these are the files that git does not ignore; an installed package is copied whole.
    """
    shutil.rmtree(target, ignore_errors=True)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_PACKAGES]
    listed = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False).stdout
    files = [_ROOT / name for name in listed.split("\0") if name]
    if not files:
        files = [path for package in _PACKAGES for path in (_ROOT / package).rglob("*.[!p]*")]
    for file in files:
        if file.is_file():  # not: deleted, but not committed so
            copy = target / file.relative_to(_ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)
