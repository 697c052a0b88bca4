"""--help of the commands that compose a configuration."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("command", "first", "clusters"),
    [
        ("trainer", "Train a model on this machine", False),
        ("data_pipeline", "Prepare the data of a run", False),
        ("slurm", "Queue a run on a SLURM cluster", True),
    ],
)
def test_help_begins_with_what_the_command_does(command, first, clusters, repository):
    run = [sys.executable, "-m", command, "--help"]
    done = subprocess.run(run, cwd=repository, capture_output=True, text=True, timeout=60, check=True)
    said, _, groups = done.stdout.partition("Groups; GROUP=NAME chooses a file:")
    lines = said.strip().splitlines()
    assert lines[0].startswith(first)
    assert len(lines) <= 10
    assert said.count(f"python -m {command} ") >= 3, "three examples"
    assert "docs/" in said
    assert "qwen3_30b_a3b" in groups
    assert "_base" not in groups, "only included by others"
    assert ("h100_ib" in groups) == clusters
