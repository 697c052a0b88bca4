"""Files of a run folder: the frozen configuration, git state, lock and attempts."""

import errno
import fcntl
import json
import os
import subprocess

import pytest

from data_pipeline.config import read_template
from trainer.settings.run_folder import (
    freeze,
    git,
    lock,
    read_frozen,
    read_run,
    record_attempt,
)


@pytest.fixture
def run_dir(composed, tmp_path):
    freeze(tmp_path, composed("deepspeed=zero1", "parallel.nproc_per_node=4"), [])
    return tmp_path


def test_a_run_needs_no_git(composed, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    freeze(tmp_path, composed(), [])
    assert (tmp_path / "git.txt").read_text() == "\n"


def test_a_diff_in_another_encoding(tmp_path):
    (tmp_path / "a").write_bytes(b"one\n")
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=t", "-c", "user.email=t", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "a").write_bytes(b"caf\xe9\n")
    assert "+caf\ufffd\n" in git("diff", "HEAD", root=tmp_path)


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    os.close(lock(tmp_path))
    assert f"warning: {tmp_path} may be running already" in capsys.readouterr().err


def test_a_run_keeps_the_template_that_was_a_file(composed, tmp_path):
    """It goes on, and the same configuration is still the same, when the file is gone."""
    file, run_dir = tmp_path / "mine.jinja", tmp_path / "run"
    text = "{{ messages[0].content }} \N{SNOWMAN}\r\n"
    file.write_bytes(text.encode())
    run_dir.mkdir()
    cfg = composed(f"data.chat_template={file}")
    freeze(run_dir, cfg, [])
    freeze(run_dir, cfg, [])
    file.unlink()
    assert read_frozen(run_dir / "config.yaml").data.chat_template == str(file)
    copy = read_run(run_dir).data.chat_template
    assert os.path.isabs(copy)
    assert read_template(copy) == text
    freeze(tmp_path, composed(), [])
    assert read_run(tmp_path).data.chat_template == "qwen3"


def test_each_attempt_is_recorded_beside_what_was_frozen(run_dir):
    frozen = json.loads((run_dir / "environment.json").read_text())
    record_attempt(run_dir, 1, {"device": "NVIDIA H100", "backends": {"experts": "grouped"}})
    record_attempt(run_dir, 3, {"device": "the CPU"})
    found = json.loads((run_dir / "environment.json").read_text())
    attempts = {
        "1": {"device": "NVIDIA H100", "backends": {"experts": "grouped"}},
        "3": {"device": "the CPU"},
    }
    assert found == {**frozen, "attempts": attempts}
    (run_dir / "environment.json").write_text("{")
    record_attempt(run_dir, 4, {})
    assert json.loads((run_dir / "environment.json").read_text()) == {"attempts": {"4": {}}}
