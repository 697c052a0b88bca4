"""The copy of the code that a job runs."""

import subprocess
from pathlib import Path

from slurm.script import snapshot

PACKAGES = ("trainer", "moe", "data_pipeline", "slurm", "conf")


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
    }


def make(root: Path) -> None:
    for package in PACKAGES:
        (root / package).mkdir(parents=True)
        (root / package / "a.py").write_text("committed")


def test_what_git_knows_and_what_it_does_not(tmp_path):
    root = tmp_path / "root"
    make(root)
    (root / "runs").mkdir()
    (root / "runs/large.bin").write_text("not code")
    (root / ".gitignore").write_text("*.tmp\n")
    (root / "moe/deleted.py").write_text("")
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=t", "-c", "user.email=t", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *command], cwd=root, check=True)
    (root / "moe/deleted.py").unlink()
    (root / "moe/a.py").write_text("changed")
    (root / "slurm/new with space.py").write_text("new")
    (root / "slurm/ignored.tmp").write_text("")
    (tmp_path / "code").mkdir()
    (tmp_path / "code/stale.py").write_text("of an earlier try")
    snapshot(tmp_path / "code", root)
    expected = {f"{package}/a.py": "committed" for package in PACKAGES}
    assert tree(tmp_path / "code") == expected | {"moe/a.py": "changed", "slurm/new with space.py": "new"}


def test_an_installed_package(tmp_path):
    root = tmp_path / "site-packages"
    make(root)
    (root / "moe/__pycache__").mkdir()
    (root / "moe/__pycache__/a.pyc").write_text("")
    (root / "torch").mkdir()
    (root / "slurm/job.sh").write_text("script")
    snapshot(tmp_path / "code", root)
    expected = {f"{package}/a.py": "committed" for package in PACKAGES}
    assert tree(tmp_path / "code") == expected | {"slurm/job.sh": "script"}


def test_a_machine_without_git(tmp_path, monkeypatch):
    make(tmp_path / "root")
    monkeypatch.setenv("PATH", str(tmp_path))
    snapshot(tmp_path / "code", tmp_path / "root")
    assert tree(tmp_path / "code") == {f"{package}/a.py": "committed" for package in PACKAGES}
