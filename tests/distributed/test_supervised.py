"""The supervised stage: its held-out loss against a slow one, and what an evaluation must leave as it was."""

from contextlib import suppress
from functools import partial
from math import exp
from typing import Any

import pytest
import torch
from commands import prepare_corpus
from harness import run_ranks
from layouts import ROWS, SEQ_LEN, SmallRun, oracle_model, slow_held_out, small_config
from torch import Tensor

from data_pipeline.config import DataError
from trainer.ranks.runtime import Ranks
from trainer.settings.config import RunConfig
from trainer.stages.held_out import open_loader
from trainer.stages.supervised import Supervised

EVALUATED = 13  # rows of each source: not a multiple of what all ranks evaluate at once
SETTINGS = [
    *("model.vocab_size=512", "model.num_nextn_predict_layers=1", "deepspeed=zero1", "parallel.ep_size=2"),
    *("micro_batch_size=4", f"evaluate.rows={EVALUATED}", "balance.bias_update_rate=0.1"),
    *("experts.capacity_factor=0.5", "experts.router_jitter_noise=0.5"),  # must not act in an evaluation
]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two prepared sources, and a model with everything that acts in training only."""
    return [*prepare_corpus(tmp_path_factory.mktemp("data")), *SETTINGS]


def bias_of(run_bias: Tensor) -> Tensor:
    """A selection bias large enough to change most choices."""
    return torch.linspace(-1, 1, run_bias.shape[1]).expand_as(run_bias)


def note_gradients(noted: list[bool], *_: object) -> None:
    noted.append(torch.is_grad_enabled())


def evaluate_between_steps(overrides: list[str]) -> dict[str, Any]:
    """What a stage evaluates, and two training steps after it, with or without the evaluation."""
    found: dict[str, Any] = {"losses": [], "gradients": []}
    for evaluates in (True, False):
        run = SmallRun(*overrides)
        run.balance.bias.copy_(bias_of(run.balance.bias))
        stage = Supervised(run.config, run.ranks, run.engine, run.balance, step=0)
        if evaluates:
            note = partial(note_gradients, found["gradients"])
            handle = run.engine.module.register_forward_hook(note)
            found |= {"held out": stage.evaluate(), "training": run.engine.module.training}
            handle.remove()
            assert torch.equal(run.balance.bias, bias_of(run.balance.bias))
        found["losses"].append(run.train(range(2))["losses"])
        with torch.no_grad():
            run.engine.module.model.norm.weight.mul_(1e6)
        found["diverged"] = stage.evaluate()
        stage.close()
        run.engine.close()
    return found


def slow_losses(overrides: list[str]) -> dict[str, float]:
    """What the evaluation should find, in fp64."""
    config = small_config(*overrides)
    bias = bias_of(torch.empty(config.model.num_moe_layers, config.model.num_experts))
    return slow_held_out(config, oracle_model(config).eval(), bias)


def test_an_evaluation_is_that_of_the_rows_with_the_bias_and_leaves_training_alone(overrides):
    for rank in run_ranks(evaluate_between_steps, 2, overrides, timeout=200):
        expected = slow_losses(overrides)
        assert {key: rank["held out"][key] for key in expected} == pytest.approx(expected, rel=1e-5)
        perplexity = {f"perplexity{key[4:]}": exp(loss) for key, loss in expected.items()}
        assert {key: rank["held out"][key] for key in perplexity} == pytest.approx(perplexity, rel=1e-4)
        assert set(rank["gradients"]) == {False}, "an evaluation keeps nothing for a backward"
        assert rank["diverged"]["loss/text"] > 1000
        assert rank["diverged"]["perplexity/text"] == exp(700), "a number, not an overflow"
        assert rank["training"], "jitter, capacity and multi-token prediction would be off from here on"
        assert rank["losses"][0] == rank["losses"][1], "the steps after it are those of a run without it"


def test_a_run_that_would_need_more_epochs_than_allowed_is_refused_at_its_start(overrides):
    """Up to the last row of its last step."""
    ranks, allowed = Ranks(0, 0, 1, torch.device("cpu")), "+data.sources.second.max_epochs=1"

    def config(steps: int) -> RunConfig:
        return small_config(*overrides, allowed, f"stage.train_tokens={steps * ROWS * SEQ_LEN}")

    most = 0
    with open_loader(config(1), ranks) as loader, suppress(DataError):
        while True:
            loader.check_budget((most + 1) * ROWS)
            most += 1
    assert most > 0
    Supervised(config(most), ranks, None, None, step=0).close()
    with pytest.raises(DataError, match=r"second\.max_epochs=1"):
        Supervised(config(most + 1), ranks, None, None, step=0)


def test_the_order_of_the_rows_depends_on_the_seed_of_the_run(overrides):
    ranks, found = Ranks(0, 0, 1, torch.device("cpu")), []
    for seed in (1, 2, 1):
        stage = Supervised(small_config(*overrides, f"seed={seed}"), ranks, None, None, step=0)
        found.append(stage.micro_batches()[0].input_ids)
        stage.close()
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
