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
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_PACKAGES],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0 and listed.stdout:
        files = [Path(name) for name in listed.stdout.split("\0") if name]
    else:
        packages = [_ROOT / package for package in _PACKAGES]
        files = [path.relative_to(_ROOT) for package in packages for path in package.rglob("*")]
        files = [path for path in files if "__pycache__" not in path.parts]
    for file in files:
        if (_ROOT / file).is_file():  # not: deleted, but not committed so
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(_ROOT / file, target / file)
