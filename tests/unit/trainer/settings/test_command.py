"""--help of the commands that compose a configuration."""

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from trainer import benchmark, evaluate, export, generate, inspect, models, report, resume


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


@pytest.mark.parametrize("door", [resume, evaluate, inspect, generate, benchmark, export, report, models])
def test_every_command_says_how_it_is_used(door, capsys):
    with pytest.raises(SystemExit) as ended:
        door.main(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {door.__name__} ")


def test_an_unknown_experiment_is_refused_with_those_there_are(repository, tmp_path):
    run = [sys.executable, "-m", "trainer", "experiment=nope", "name=x", f"output_dir={tmp_path}"]
    done = subprocess.run(run, cwd=repository, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "Could not find 'experiment/nope'" in done.stderr
    assert "demo_sft" in done.stderr
    assert not list(tmp_path.iterdir())


def test_sources_on_the_command_line_replace_those_of_the_group(repository):
    given = [
        "experiment=demo",
        "data.sources={mine: {kind: jsonl, paths: [a.jsonl]}}",
        "data.sources.mine.kind=text",
    ]
    for command in ("data_pipeline", "trainer"):
        run = [sys.executable, "-m", command, "experiment=demo", *given, "--cfg", "job"]
        done = subprocess.run(run, cwd=repository, capture_output=True, text=True, timeout=60, check=True)
        assert OmegaConf.create(done.stdout).data.sources == {"mine": {"kind": "text", "paths": ["a.jsonl"]}}
