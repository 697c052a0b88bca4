"""The five stages of the demo experiments in a chain, on a smaller model."""

import json
import math
from pathlib import Path

import pytest
from commands import python
from omegaconf import OmegaConf

SMALL = [
    "data.tokenizer_vocab_size=1024",
    "model.vocab_size=1024",
    "model.hidden_size=64",
    "model.num_hidden_layers=2",
    "model.num_experts=16",
    "model.num_experts_per_tok=4",
    "model.moe_intermediate_size=32",
    "checkpoint.every_steps=1000",
    "evaluate.every_steps=0",
    "tracker.log_every_steps=1",
]
UNKNOWN = math.log(1024)  # the loss of an untrained model, to within a few hundredths
STAGES = {  # steps of 2048, 2048, 4096 and 4096 tokens, and of 32 completions
    "general": ["stage.seq_len=128", "stage.train_tokens=163840", "optimizer.lr=5e-3"],
    "stem_code": ["stage.seq_len=128", "stage.train_tokens=20480"],
    "long_context": ["stage.train_tokens=40960"],
    # the short answers of the small tasks look like nothing that was seen before
    "sft": [
        "stage.train_tokens=40960",
        *("data.sources.stdlib_chat.weight=1.0", "data.sources.task_chat.weight=0.0"),
    ],
    "rl": [
        *("stage.global_batch_size=32", "micro_batch_size=8", "stage.train_tokens=9216"),
        "rl.flat_groups=keep",  # nobody answers rightly yet
    ],
}


def run(module: str, stage: str, folder: Path, *overrides: str) -> str:
    arguments = [module, f"experiment=demo_{stage}", *SMALL, *STAGES[stage], *overrides]
    done = python(*arguments, cwd=folder, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def steps(folder: Path, name: str) -> list[dict]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]  # other lines report saves


@pytest.mark.timeout(600)
def test_each_stage_goes_on_from_the_weights_of_the_last(tmp_path: Path) -> None:
    run("data_pipeline", "general", tmp_path)
    said = {stage: run("trainer", stage, tmp_path) for stage in STAGES}
    assert [stage for stage in STAGES if "padding" in said[stage]] == ["long_context", "sft"]

    last = steps(tmp_path, "demo_general")[-1]["loss"]
    assert last < UNKNOWN - 1.0
    for stage in ("stem_code", "long_context", "sft"):
        first = steps(tmp_path, f"demo_{stage}")[0]
        assert first["loss"] < UNKNOWN - 0.5, f"{stage} must keep what the stage before has learned"
        config = OmegaConf.load(tmp_path / f"runs/demo_{stage}/config.yaml")
        # optimizer and data state are not carried over: this is the first of five warmup steps
        assert (first["step"], first["tokens"]) == (1, config.stage.seq_len * config.stage.global_batch_size)
        assert first["learning_rate"] == pytest.approx(config.optimizer.lr / 5)
    assert steps(tmp_path, "demo_stem_code")[0]["loss"] < last + 0.6, "the next stage must keep the loss"

    padding = [line["padding"] for line in steps(tmp_path, "demo_long_context")]
    assert 0 < sum(padding) / len(padding) < 0.1
    assert all(0 <= line["stall_fraction"] < 0.5 for line in steps(tmp_path, "demo_sft"))
    rewarded = steps(tmp_path, "demo_rl")
    assert [line["step"] for line in rewarded] == [1, 2, 3]
    assert all(line["ratio"] == pytest.approx(1, abs=1e-5) for line in rewarded)
    assert all(line["sources"]["task_prompts"]["prompts"] == 4 * line["step"] for line in rewarded)
    written = json.loads((tmp_path / "runs/demo_sft/checkpoints/step-00000010/hf/config.json").read_text())
    assert written["rope_theta"] == 1_000_000


def test_a_run_without_a_checkpoint_is_no_start(tmp_path: Path) -> None:
    empty = tmp_path / "runs/demo_general"
    empty.mkdir(parents=True)
    (empty / "config.yaml").write_text("")
    done = python("trainer", "experiment=demo_stem_code", cwd=tmp_path)
    assert done.returncode == 2
    assert "stage.init_from=runs/demo_general: runs/demo_general has no checkpoint yet" in done.stderr
