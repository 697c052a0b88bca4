"""Value and router gradient of the balance loss are those of the global batch, however it is split.

One plain SGD step of rate 1 gives the gradients under any ZeRO stage: gradient = before - after. The weights
of balance loss and z-loss are so large that cross entropy and the rounding of the difference hardly matter.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import layouts
import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

import moe.block
import trainer.engine.loss
from moe.balance import Balance, expert_frequencies
from moe.block import MoEBlock
from trainer.checkpoints.assemble import build_model
from trainer.engine.engine import Engine, init_deepspeed
from trainer.engine.loss import agree_on_totals, build_balance
from trainer.ranks.runtime import Ranks
from trainer.stages.supervised import Supervised
from trainer.train import KEPT, train_step

TOLERANCE = 1e-6
WEIGHTS = ["model.router_aux_loss_coef=1000", "balance.z_loss_coef=10", "optimizer.max_grad_norm=0"]


def layout(world: int, stage: int, count: int, ep_size: int, recompute: str) -> tuple[int, list[str]]:
    """Number of ranks, and the overrides for `count` micro-batches per step."""
    rows = f"micro_batch_size={layouts.ROWS // (world * count)}"
    return world, [f"deepspeed=zero{stage}", rows, f"parallel.ep_size={ep_size}", f"recompute={recompute}"]


ALL = [
    layout(world, stage, count, ep_size, recompute)
    for world, stage, count, ep_size, recompute in product(
        (1, 2, 4), (0, 1, 2, 3), (1, 2, 4), (1, 2), ("none", "full")
    )
    if ep_size <= world
]
# every pair of world size and stage, of stage and recompute, and of micro-batches and recompute
COVERING = [
    layout(1, 0, 4, 1, "full"),
    layout(1, 1, 2, 1, "none"),
    layout(1, 2, 1, 1, "full"),
    layout(1, 3, 4, 1, "none"),
    layout(2, 0, 1, 2, "none"),
    layout(2, 1, 4, 2, "full"),
    layout(2, 2, 2, 1, "none"),
    layout(2, 3, 2, 2, "full"),
    layout(4, 1, 4, 2, "none"),
    layout(4, 2, 2, 1, "full"),
    layout(4, 3, 1, 2, "none"),
    layout(4, 0, 4, 2, "full"),
    # more than KEPT micro-batches, so that the counts need a pass of their own
    layout(2, 0, 8, 1, "full"),
    layout(2, 2, 8, 2, "full"),
]


def oracle() -> dict[str, Any]:
    """Balance loss and router gradients by the formula: fp64, one process, all rows at once."""
    config = layouts.small_config(f"micro_batch_size={layouts.ROWS}", *WEIGHTS)
    model = layouts.oracle_model(config)
    (batch,) = layouts.micro_batches(config.plan(1), 0, 0)
    output = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.token_mask, batch.labels)
    tokens, experts, top_k = batch.token_mask.sum(), 8, 2
    f = output.router.tokens_per_expert / (top_k * tokens)
    balance = experts * (f * output.router.probability_sums / tokens).sum(dim=1)
    cross_entropy = output.cross_entropy_sum / (batch.labels != -100).sum()
    (cross_entropy + 1000 * balance.sum() + 10 * (output.router.z_sums / tokens).sum()).backward()
    gradients = {n: p.grad.float() for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")}
    return {"balance": balance.mean().item(), "gradients": gradients}


def measure(*overrides: str) -> dict[str, Any]:
    """Balance loss and router gradients of one step of the engine under a layout."""
    init_deepspeed(torch.device("cpu"))
    ranks = Ranks(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    config = layouts.small_config(*WEIGHTS, *overrides)
    plan = config.plan(ranks.world_size)
    config.check(plan.world_size)
    model = build_model(config, plan, ranks)
    groups: dict[bool, dict[str, Any]] = {}
    for parameter in model.parameters():
        expert = getattr(parameter, "group_name", None)
        group = groups.setdefault(
            bool(expert), {"params": [], "name": expert or "shared", "moe": bool(expert)}
        )
        group["params"].append(parameter)
    engine = Engine(model, torch.optim.SGD(list(groups.values()), lr=1.0), config, plan, ranks)
    before = layouts.gather_parameters(engine, plan, ranks)
    batches = layouts.micro_batches(plan, ranks.rank, 0)
    totals = agree_on_totals(batches, False)
    sums, _, _ = train_step(
        engine, build_balance(config, plan, ranks.device), Supervised.loss_shares, batches, totals, 1.0
    )
    after = layouts.gather_parameters(engine, plan, ranks)
    balance = sums.over_ranks().describe(totals)["balance_loss"]
    engine.close()
    return {
        "balance": balance,
        "gradients": {n: before[n] - after[n] for n in before if n.endswith("gate.weight")},
    }


def measure_many(overrides: list[list[str]], mutant: str | None = None) -> list[dict[str, Any]]:
    if mutant is not None:
        MUTANTS[mutant]()
    return [measure(*one) for one in overrides]


def deviation(measured: dict[str, Any], expected: dict[str, Any]) -> float:
    """Largest relative error of the value and of any layer's router gradient (by norm)."""
    errors = [abs(measured["balance"] / expected["balance"] - 1)]
    for name, gradient in expected["gradients"].items():
        errors.append(((measured["gradients"][name] - gradient).norm() / gradient.norm()).item())
    return max(errors)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return oracle()


def check(
    selection: list[tuple[int, list[str]]], world_size: int, expected: dict[str, Any], timeout: float
) -> None:
    chosen = [overrides for size, overrides in selection if size == world_size]
    for overrides, measured in zip(
        chosen, run_ranks(measure_many, world_size, chosen, timeout=timeout)[0], strict=True
    ):
        assert deviation(measured, expected) < TOLERANCE, overrides


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_exact_is_the_global_batch(expected, world_size):
    check(COVERING, world_size, expected, timeout=200)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_exact_is_the_global_batch_in_every_layout(expected, world_size):
    check(ALL, world_size, expected, timeout=800)


@pytest.mark.parametrize("mode", ["micro_batch", "buffer", "prior_buffer"])
def test_the_other_modes_are_approximations(expected, mode):
    _, overrides = layout(1, 1, 4, 1, "none")
    measured = run_ranks(measure_many, 1, [[*overrides, f"balance.mode={mode}"]])[0][0]
    assert deviation(measured, expected) > 1e-3


def biases(counts: list[list[list[float]]]) -> dict[str, list[float]]:
    """The bias in each mode after a step in which a rank counts `counts` [ranks, micro-batches, E]."""
    mine, found = [torch.tensor([part]) for part in counts[dist.get_rank()]], {}
    for mode in ("exact", "buffer", "prior_buffer", "micro_batch"):
        sizes = {"num_layers": 1, "num_experts": 3, "micro_batches_per_step": len(mine)}
        balance = Balance(mode, **sizes, bias_update_rate=0.5)
        if balance.counts_first:
            balance.count_first(mine)
        for part in mine:
            balance.frequencies(part, 24)
        balance.end_step()
        assert balance.bias is not None
        found[mode] = balance.bias[0].tolist()
    return found


def test_the_bias_sees_all_ranks_in_every_mode() -> None:
    """Expert 0 is the busiest on rank 0 and idle over all ranks."""
    counts = [[[4.0, 1.0, 1.0], [3.0, 2.0, 1.0]], [[0.0, 3.0, 3.0], [0.0, 4.0, 2.0]]]  # sums 7, 10, 7
    for found in run_ranks(biases, 2, counts):
        assert found == {mode: [0.5, -0.5, 0.5] for mode in found}


def forwards(overrides: list[str], micro_batches: list[int]) -> dict[int, list[bool]]:
    """For each number of micro-batches, whether each forward of a step, in order, is for routing only."""
    seen: list[bool] = []
    forward = Engine.forward

    def noted(self: Any, batch: Any, bias: Any = None, routing_only: bool = False) -> Any:
        seen.append(routing_only)
        return forward(self, batch, bias, routing_only)

    Engine.forward = noted  # type: ignore
    found = {}
    for count in micro_batches:
        measure(*overrides, *layout(dist.get_world_size(), 1, count, 1, "full")[1])
        found[count], seen[:] = list(seen), []
    return found


def test_few_forwards_wait_for_the_counts() -> None:
    """With more than KEPT micro-batches, every rank runs a separate forward pass for the counts."""
    expected = {KEPT: [False] * KEPT, 2 * KEPT: [True] * 2 * KEPT + [False] * 2 * KEPT}
    assert run_ranks(forwards, 2, [], list(expected)) == [expected] * 2


def slots_and_counts(overrides: list[str]) -> list[tuple[int, float]]:
    """How many slots `Balance.frequencies` is told of in each micro-batch, and how many that one has."""
    noted: list[tuple[int, float]] = []
    frequencies = Balance.frequencies

    def listening(self: Any, counts: Any, slots: int) -> Any:
        noted.append((slots, counts[0].sum().item()))
        return frequencies(self, counts, slots)

    Balance.frequencies = listening  # type: ignore
    measure(*overrides)
    return noted


def test_the_balance_is_told_how_many_slots_the_global_batch_has() -> None:
    """balance.mode=prior_buffer weights what it has seen by its share of them."""
    by_rank = run_ranks(slots_and_counts, 2, layout(2, 1, 4, 2, "none")[1])
    noted = [one for of in by_rank for one in of]
    assert len(noted) == 2 * 4
    assert {slots for slots, _ in noted} == {sum(counts for _, counts in noted)}


def divide_twice_by_the_ranks() -> None:
    build: Callable[..., None] = Engine.__init__

    def forgetful(self: Any, *args: Any) -> None:
        build(self, *args)
        self._averaged_over = 1  # the factor that undoes DeepSpeed's average over ranks

    Engine.__init__ = forgetful  # type: ignore


def count_in_recompute() -> None:
    """Keep the counts as module state, to which recomputed forwards then add as well."""
    forward: Callable[..., Any] = MoEBlock.forward

    def counting(self: Any, *args: Any) -> Any:
        y, statistics = forward(self, *args)
        self.total = getattr(self, "total", 0) + statistics.tokens_per_expert.detach()
        return y, statistics._replace(tokens_per_expert=self.total)

    moe.block.MoEBlock.forward = counting  # type: ignore


def pool_layers() -> None:
    share = trainer.engine.loss.balance_loss_share
    trainer.engine.loss.balance_loss_share = lambda f, s, n: share(f.mean(0, keepdim=True), s, n)  # type: ignore


def count_padding() -> None:
    forward: Callable[..., Any] = MoEBlock.forward
    moe.block.MoEBlock.forward = lambda self, hidden, routing: forward(  # type: ignore
        self, hidden, replace(routing, token_mask=None)
    )


def frequencies_of_the_micro_batch() -> None:
    trainer.train.Balance.frequencies = lambda self, counts, slots: expert_frequencies(counts)  # type: ignore


MUTANTS = {
    "f per micro-batch": frequencies_of_the_micro_batch,
    "divided by the ranks twice": divide_twice_by_the_ranks,
    "counted in recompute": count_in_recompute,
    "layers pooled": pool_layers,
    "padding counted": count_padding,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_loss_is_noticed(expected, mutant):
    _, overrides = layout(2, 1, 4, 2, "full")
    assert deviation(run_ranks(measure_many, 2, [overrides], mutant)[0][0], expected) > 100 * TOLERANCE
