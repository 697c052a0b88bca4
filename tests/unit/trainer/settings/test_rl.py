"""The laws of reinforcement learning: each broken one is told, with its key, value and remedy."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from moe.config import ConfigError
from trainer.settings.config import RunConfig

BASE = [
    *("name=t", "rl=grpo", "data=jsonl", "data.dir=d", "data.tokenizer_vocab_size=512", "stage.seq_len=64"),
    "+data.sources.asks={kind: prompts, paths: [a.jsonl]}",
    "+data.sources.text={kind: jsonl, paths: [a.jsonl], weight: 0.0}",
    *("rl.max_prompt_tokens=40", "rl.sampling.max_new_tokens=24", "schedule.warmup_steps=1"),
]
VERIFIER = "rl.verifiers={answer: {kind: exact, weight: 1.0}}"


def load(*overrides: str) -> RunConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return RunConfig.load(compose("train", overrides=[*BASE, VERIFIER, *overrides]))


def test_a_sound_run_passes() -> None:
    load().check()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.group_size=1", "rl.group_size=1 compares a completion with nothing; use 2 or more"),
        ("rl.group_size=3", "must be a multiple of rl.group_size=3"),
        ("rl.max_prompt_tokens=41", "exceed stage.seq_len=64; raise it to 65"),
        ("rl.sampling.temperature=0", "makes all of a group equal; use 1.0"),
        ("rl.sampling.temperature=-1", "rl.sampling.temperature=-1.0 is below 0"),
        ("rl.sampling.top_p=0", r"top_p=0.0 is outside (0, 1]"),
        ("rl.sampling.top_p=1.1", r"top_p=1.1 is outside (0, 1]"),
        ("rl.sampling.min_new_tokens=25", "min_new_tokens=25 exceeds max_new_tokens=24; lower it"),
        ("rl.clip_low=1.0", "rl.clip_low=1.0 must be below 1"),
        ("rl.clip_low=0.29", "rl.clip_low=0.29 exceeds rl.clip_high=0.28; they seem to be exchanged"),
        ("rl.overlong=penalise", "rl.overlong_buffer=0 must be between 1 and rl.sampling.max_new_tokens=24"),
        ("rl.kl_coef=0.1", "rl.kl_coef=0.1 needs rl.reference"),
        ("rl.reference=somewhere", "rl.reference=somewhere has no use with rl.kl_coef=0"),
        ("rl.updates=0", "rl.updates=0 is below 1"),
        ("rl.advantage=best", "rl.advantage=best is unknown; use deviation, mean"),
        ("rl.sampling.router_replay=maybe", "router_replay=maybe is unknown; use none, measure, replay"),
        (
            "rl.verifiers.answer.kind=exactly",
            "kind=exactly is unknown (did you mean exact?)",
        ),
        ("rl.verifiers.answer.weight=-1", "rl.verifiers.answer.weight=-1.0 is below 0; use 0 or more"),
        ("+rl.verifiers.answer.seconds=0", "rl.verifiers.answer.seconds=0.0 is below 0.01"),
        ("rl.verifiers.answer.kind=no_such_module:check", "no_such_module cannot be imported"),
        (
            "experts.capacity_factor=1.25",
            "capacity_factor=1.25: sampling and training must",
        ),
        (
            "experts.router_jitter_noise=0.1",
            "router_jitter_noise=0.1: sampling and training must",
        ),
        ("model.num_nextn_predict_layers=1", "num_nextn_predict_layers=1 is not trained by rewards; use 0"),
        (
            "data.sources.text.weight=1.0",
            "text.kind=jsonl cannot be read by a stage that samples",
        ),
    ],
)
def test_each_law(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(override).check()
    assert message in str(error.value)


def test_prompts_have_no_use_without_rewards() -> None:
    with initialize_config_module("conf", version_base="1.3"):
        chosen = [one for one in BASE if not one.startswith("rl")]
        config = RunConfig.load(compose("train", overrides=chosen))
    with pytest.raises(
        ConfigError, match=r"asks\.kind=prompts cannot be read by a stage that trains on text"
    ):
        config.check()


def test_a_reference_is_a_folder_with_the_model_of_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rl\.reference=nowhere is not a folder"):
        load("rl.kl_coef=0.1", "rl.reference=nowhere").check()
    config = load("rl.kl_coef=0.1", f"rl.reference={tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps(config.model.to_hf()))
    config.check()
    other = load("model.num_experts=64", "rl.kl_coef=0.1", f"rl.reference={tmp_path}")
    with pytest.raises(ConfigError, match=r"has num_experts=128, but model\.num_experts=64; set the same"):
        other.check()
