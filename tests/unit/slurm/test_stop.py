"""Stopping a run, with fake SLURM commands."""

import pytest

from moe.config import ConfigError
from slurm.stop import stop


def test_a_job_that_has_just_ended_does_not_save_the_others(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("")
    (run_dir / "jobs").write_text("7\n8\n")
    answers = {
        "squeue": 'case "$*" in *7) echo "7|COMPLETING|n1";; *) echo "8|PENDING|(Priority)";; esac',
        "scancel": f'echo "$@" >>{tmp_path}/asked; [ "$1" = 8 ] || {{ echo completing >&2; exit 1; }}',
    }
    for name, answer in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ConfigError, match="job 7: scancel refuses: completing"):
        stop(run_dir)
    assert (tmp_path / "asked").read_text() == "7\n8\n"
