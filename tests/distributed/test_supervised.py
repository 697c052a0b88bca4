"""The supervised stage: its held-out loss against a slow one, and what an evaluation must leave as it was."""

from math import exp
from typing import Any

import pytest
import torch
from commands import prepare_corpus
from harness import run_ranks
from layouts import SmallRun, oracle_model, slow_held_out, small_config
from torch import Tensor

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


def evaluate_between_steps(overrides: list[str]) -> dict[str, Any]:
    """What a stage evaluates, and two training steps after it, with or without the evaluation."""
    found: dict[str, Any] = {"losses": []}
    for evaluates in (True, False):
        run = SmallRun(*overrides)
        run.balance.bias.copy_(bias_of(run.balance.bias))
        stage = Supervised(run.config, run.ranks, run.engine, run.balance, step=0)
        if evaluates:
            found |= {"held out": stage.evaluate(), "training": run.engine.module.training}
            assert torch.equal(run.balance.bias, bias_of(run.balance.bias))
        found["losses"].append(run.train(range(2))["losses"])
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
        assert rank["training"], "jitter, capacity and multi-token prediction would be off from here on"
        assert rank["losses"][0] == rank["losses"][1], "the steps after it are those of a run without it"
