"""The supervised stage: its held-out loss against a slow one, and what an evaluation must leave as it was."""

from itertools import islice
from math import exp
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from commands import prepare_corpus
from harness import run_ranks
from layouts import SmallRun, oracle_model, small_config
from torch import Tensor

from trainer.ranks.runtime import Ranks
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
    """One process, one row at a time, fp64, cross entropy from the logits."""
    config = small_config(*overrides)
    model = oracle_model(config).eval()
    bias = bias_of(torch.empty(config.model.num_moe_layers, config.model.num_experts)).double()
    ranks, sums = Ranks(0, 0, 1, torch.device("cpu")), torch.zeros(2, dtype=torch.float64)
    found = {}
    for source in config.data.sources:
        total = torch.zeros(2, dtype=torch.float64)
        rows = {"global_batch_size": 1, "micro_batch_size": 1, "split": "validation", "source": source}
        with open_loader(config, ranks, **rows) as loader, torch.no_grad():
            for (batch,) in islice(loader, EVALUATED):
                place = (batch.input_ids, batch.position_ids, batch.cu_seqlens)
                logits = model(*place, selection_bias=bias).logits[0]
                loss = F.cross_entropy(logits, batch.labels[0], reduction="sum")
                total += torch.stack([loss, (batch.labels != -100).sum()])
        found[f"loss/{source}"] = float(total[0] / total[1])
        sums += total
    return found | {"loss/validation": float(sums[0] / sums[1])}


def test_an_evaluation_is_that_of_the_rows_with_the_bias_and_leaves_training_alone(overrides):
    for rank in run_ranks(evaluate_between_steps, 2, overrides, timeout=200):
        expected = slow_losses(overrides)
        assert {key: rank["held out"][key] for key in expected} == pytest.approx(expected, rel=1e-5)
        perplexity = {f"perplexity{key[4:]}": exp(loss) for key, loss in expected.items()}
        assert {key: rank["held out"][key] for key in perplexity} == pytest.approx(perplexity, rel=1e-4)
        assert rank["training"], "jitter, capacity and multi-token prediction would be off from here on"
        assert rank["losses"][0] == rank["losses"][1], "the steps after it are those of a run without it"
