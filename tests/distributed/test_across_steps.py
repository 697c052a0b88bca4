"""Six steps with everything on, an evaluation, a save and a resume in between, against a slow run by hand.

State that should be reset, kept or left alone from step to step shows here.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import prepare_corpus
from harness import run_ranks
from layouts import (
    SmallRun,
    micro_batches,
    oracle_model,
    oracle_optimizer,
    slow_held_out,
    small_config,
)
from torch import Tensor

from moe.router import TrainingRouting
from trainer.checkpoints.saving import Checkpoints
from trainer.stages.supervised import Supervised

SAVED, STEPS, TOLERANCE = 3, 6, 1e-5
EVERYTHING = [
    *("model.vocab_size=512", "model.initializer_range=0.1", "model.num_nextn_predict_layers=1"),
    *("parallel.ep_size=2", "micro_batch_size=4", "evaluate.rows=8"),  # two micro-batches for each rank
    *("experts.router_jitter_noise=0.2", "experts.capacity_factor=1.0", "balance.bias_update_rate=0.02"),
]
LAYOUTS = [
    ["deepspeed=zero0", "recompute=full"],
    ["deepspeed=zero1"],
    ["deepspeed=zero2", "micro_batch_size=8"],  # one micro-batch: the balance counts during the step
    ["deepspeed=zero3"],
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare_corpus(tmp_path_factory.mktemp("data"))


def run_on_ranks(overrides: list[str], folder: str) -> dict[str, Any]:
    """The product: a step after the save is lost, as if the run had died, and done again by the resume."""
    found: dict[str, Any] = {"losses": [], "mtp_losses": [], "grad_norms": [], "held out": []}

    def train(run: SmallRun, steps: range) -> None:
        outcome = run.train(steps)
        for key in ("losses", "mtp_losses", "grad_norms"):
            found[key] += outcome[key]
        stage = Supervised(run.config, run.ranks, run.engine, run.balance, steps.stop)
        found["held out"].append(stage.evaluate())
        found["parameters"], found["bias"] = outcome["parameters"], run.balance.bias

    def checkpoints(run: SmallRun) -> Checkpoints:
        return Checkpoints(Path(folder), 1, run.config, run.plan, run.ranks, print)

    run = SmallRun(*overrides)
    train(run, range(SAVED))
    saver = checkpoints(run)
    saver.save(run.engine, run.balance, SAVED, {})
    saver.finish()
    run.train(range(SAVED, SAVED + 1))
    run.engine.close()
    resumed = SmallRun(*overrides, "model.initializer_range=0.5")
    assert checkpoints(resumed).load_latest(resumed.engine, resumed.balance) == (SAVED, {})
    train(resumed, range(SAVED, STEPS))
    resumed.engine.close()
    return found


def run_all_on_ranks(runs: list[list[str]], folder: str) -> list[dict[str, Any]]:
    return [run_on_ranks(overrides, f"{folder}/{number}") for number, overrides in enumerate(runs)]


def run_by_hand(overrides: list[str]) -> dict[str, Any]:
    """The reference: one process, fp64, one micro-batch of one rank after another, nothing kept between steps
    but the weights, AdamW's states and the selection bias."""
    config = small_config(*overrides, "experts.backend=reference")
    model = oracle_model(config)
    optimizer = oracle_optimizer(model, config)
    bias = torch.zeros(config.model.num_moe_layers, config.model.num_experts)
    found: dict[str, Any] = {"losses": [], "mtp_losses": [], "grad_norms": [], "held out": []}
    for step in range(STEPS):
        batches = [batch for rank in range(2) for batch in micro_batches(config.plan(2), rank, step)]
        label_tokens = sum(int((batch.labels != -100).sum()) for batch in batches)
        tokens = sum(int(batch.token_mask.sum()) for batch in batches)

        def forward(batch: Any) -> Any:
            keys = [f"{config.seed}:{row}" for row in batch.rows]
            routing = TrainingRouting(
                config.experts.router_jitter_noise, config.experts.capacity_factor, keys
            )
            place = (batch.input_ids, batch.position_ids, batch.cu_seqlens)
            given = {"token_mask": batch.token_mask, "labels": batch.labels, "routing": routing}
            return model(*place, **given, selection_bias=bias)  # noqa: B023, called in this step only

        outputs = [forward(batch) for batch in batches]
        counts = sum(output.router.tokens_per_expert.detach() for output in outputs)  # [L,E]
        frequencies = counts / counts.sum(dim=1, keepdim=True)
        cross_entropy = sum(output.cross_entropy_sum for output in outputs) / label_tokens
        ahead = sum(output.mtp_cross_entropy_sum for output in outputs) / label_tokens
        probabilities = sum(output.router.probability_sums for output in outputs) / tokens
        balance = config.model.num_experts * (frequencies * probabilities).sum()
        z = sum(output.router.z_sums for output in outputs).sum() / tokens
        optimizer.zero_grad()
        (cross_entropy + 0.3 * ahead + 0.1 * balance + 0.01 * z).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        bias = bias + config.balance.bias_update_rate * torch.sign(counts.mean(1, keepdim=True) - counts)
        found["losses"].append(cross_entropy.item())
        found["mtp_losses"].append(ahead.item())
        found["grad_norms"].append(norm.item())
        if step + 1 in (SAVED, STEPS):
            found["held out"].append(slow_held_out(config, model.eval(), bias))
            model.train()
    parameters = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    return found | {"parameters": parameters, "bias": bias}


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_six_steps_are_those_of_a_run_by_hand(corpus, tmp_path):
    runs = [[*corpus, *EVERYTHING, *layout] for layout in LAYOUTS]
    by_rank = run_ranks(run_all_on_ranks, 2, runs, str(tmp_path), timeout=280)
    for layout, overrides, *outcomes in zip(LAYOUTS, runs, *by_rank, strict=True):
        expected = run_by_hand(overrides)
        assert len({round(loss, 4) for loss in expected["losses"]}) == STEPS
        for found in outcomes:
            compare(found, expected, layout)


def compare(found: dict[str, Any], expected: dict[str, Any], layout: list[str]) -> None:
    for key in ("losses", "mtp_losses", "grad_norms"):
        assert found[key] == pytest.approx(expected[key], rel=TOLERANCE), (layout, key)
    for mine, theirs in zip(found["held out"], expected["held out"], strict=True):
        assert {key: mine[key] for key in theirs} == pytest.approx(theirs, rel=TOLERANCE), layout
    assert torch.equal(found["bias"], expected["bias"]), layout
    assert found["parameters"].keys() == expected["parameters"].keys()
    worst = {name: largest(found["parameters"][name], one) for name, one in expected["parameters"].items()}
    assert max(worst.values()) < TOLERANCE, (layout, worst)
