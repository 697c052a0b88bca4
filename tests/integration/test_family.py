"""The experiment of each architecture learns on the embedded corpus, and its checkpoint generates."""

import json
from pathlib import Path

import pytest
from commands import python

pytestmark = pytest.mark.slow  # takes minutes: real widths, real text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the embedded corpus prepared."""
    folder = tmp_path_factory.mktemp("family")
    prepared = python("data_pipeline", "experiment=demo", cwd=folder, timeout=600)
    assert prepared.returncode == 0, prepared.stderr
    return folder


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "experiment", ["demo_qwen2", "demo_qwen3", "demo_qwen2_moe", "demo", "demo_qwen3_next"]
)
def test_the_experiment_learns(folder, experiment):
    steps = ["stage.train_tokens=65536", "schedule.warmup_steps=4", "tracker.log_every_steps=1"]  # 16 steps
    done = python("trainer", f"experiment={experiment}", *steps, "evaluate.rows=8", cwd=folder, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = folder / "runs" / experiment
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 16
    assert losses[0] > 8  # ln 4096 = 8.3 is the loss of an untrained model
    assert losses[-1] < losses[0] - 1
    generated = python("trainer.generate", str(run_dir), "def ", "--tokens", "8", cwd=folder, timeout=300)
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.startswith("def ")
