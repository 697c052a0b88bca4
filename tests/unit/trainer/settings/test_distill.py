"""The laws of distillation."""

from pathlib import Path

import pytest
import torch

from moe.config import ConfigError
from moe.hf import write_config
from trainer.settings.config import RunConfig


@pytest.fixture
def teacher(run_config, tmp_path: Path) -> list[str]:
    """Overrides that name a folder with the configuration of a teacher of 128 experts."""
    write_config(run_config("model=tiny_moe").model, torch.float32, tmp_path)
    return ["model=tiny_dense", "distill=teacher", f"distill.teacher={tmp_path}"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            ["distill.teacher=nowhere/at_all/x"],
            "distill.teacher=nowhere/at_all/x is not a folder; name a run",
        ),
        (["distill.weight=-0.1"], "distill.weight=-0.1 is outside 0 to 1; use a fraction"),
        (["distill.weight=1.1"], "distill.weight=1.1 is outside 0 to 1; use a fraction"),
        (["distill.weight=nan"], "distill.weight=nan must be a finite number"),
        (["distill.top_k=4097"], "distill.top_k=4097 exceeds model.vocab_size=4096; lower it"),
        (["model.vocab_size=5000"], "has vocab_size=4096, but model.vocab_size=5000; set the same"),
        (["distill.temperature=0"], "distill.temperature=0.0 is below 0.01; use 0.01 or more"),
        (["distill.divergence=sideways"], "distill.divergence=sideways"),
        (
            ["model.max_position_embeddings=8192", "stage.seq_len=8192"],
            "reads at most 4096 tokens; lower stage",
        ),
        (
            ["model=tiny_moe", "model.num_experts=9", "parallel.nproc_per_node=3", "parallel.ep_size=3"],
            "has 128",
        ),
    ],
)
def test_mistakes(run_config, teacher, keys, said):
    with pytest.raises(ConfigError) as error:
        run_config(*teacher, "stage.global_batch_size=6", *keys).check()
    assert any(said in problem for problem in error.value.problems), error.value.problems


def test_a_teacher_may_be_of_another_size_and_family(run_config, teacher):
    run_config(*teacher).check()
    run_config(*teacher, "model.num_hidden_layers=2", "distill.top_k=4096", "distill.weight=1").check()


def test_rewards_and_a_teacher_are_two_stages(run_config, teacher):
    with pytest.raises(ConfigError, match="rl and distill cannot be one stage; set one to null"):
        run_config(
            *teacher,
            "rl=grpo",
            "rl.max_prompt_tokens=8",
            "rl.sampling.max_new_tokens=8",
            "rl.verifiers={a: {kind: exact, weight: 1}}",
        ).check()


def test_lessons_that_are_none(run_config, teacher, tmp_path: Path):
    run: RunConfig = run_config(*teacher, f"distill.lessons={tmp_path}/said")
    assert run.distill is not None
    run.check()  # the folder of a run that is frozen may be made later
    for text in (None, "", "[]", "{}", '{"teacher": 1}'):
        (tmp_path / "said").mkdir(exist_ok=True)
        if text is not None:
            (tmp_path / "said/teacher.json").write_text(text)
        with pytest.raises(
            ConfigError, match=r"is no folder of lessons .* make it with python -m trainer.teach"
        ):
            run.distill.check_lessons(256)
