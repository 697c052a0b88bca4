"""Norms by kind, packed sums and per-rank figures, under every ZeRO stage, against one process in fp64."""

import time
from collections import defaultdict
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import run_ranks
from layouts import (
    RATE,
    ROWS,
    SEQ_LEN,
    SmallRun,
    gather_parameters,
    micro_batches,
    oracle_model,
    small_config,
)
from torch import Tensor

from moe.parallelize import dispatched
from trainer.checkpoints.assemble import build_model
from trainer.engine.engine import Engine, init_deepspeed
from trainer.engine.loss import agree_on_totals, build_balance
from trainer.engine.optimizer import KINDS, build_optimizer, kind_of
from trainer.monitor.metrics import Meter, OptimizerNorms, StepSums
from trainer.ranks.runtime import Ranks
from trainer.stages.supervised import Supervised
from trainer.train import train_step

TOLERANCE = 1e-5
LAYOUTS = [
    (world_size, stage, ep_size)
    for world_size, stage, ep_size in product((2, 4), (0, 1, 2, 3), (1, 2))
    if world_size == 2 or ep_size == 2
]


class Clones:
    """Sums of the squared changes that the optimizer makes, by kind, from copies of what it steps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.squares = torch.zeros(len(KINDS), dtype=torch.float64)
        self._old: list[tuple[int, Tensor, Tensor]] = []
        optimizer.register_step_pre_hook(self._copy)
        optimizer.register_step_post_hook(self._compare)

    def _copy(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._old.append((KINDS.index(group["kind"]), tensor.detach().double(), tensor))

    def _compare(self, *_: object) -> None:
        for kind, old, tensor in self._old:
            self.squares[kind] += (old - tensor.detach()).square().sum()
        self._old.clear()


def measure(*overrides: str) -> dict:
    """One step on this rank's share: norms by kind, histograms, statistics, traffic."""
    init_deepspeed(torch.device("cpu"))
    ranks = Ranks(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    config = small_config(*overrides)
    plan = config.plan(ranks.world_size)
    model = build_model(config, plan, ranks)
    optimizer = build_optimizer(model, config.optimizer)
    engine = Engine(model, optimizer, config, plan, ranks)
    norms, clones = OptimizerNorms(optimizer, config, plan), Clones(optimizer)
    before = gather_parameters(engine, plan, ranks)
    norms.arm(ranks.device, histograms=True)
    engine.clock.lap()
    engine.clock.measuring = True
    batches = micro_batches(plan, ranks.rank, 0)
    totals = agree_on_totals(batches, False)
    balance = build_balance(config, plan, ranks.device)
    sums, _, grad_norm = train_step(engine, balance, Supervised.loss_shares, batches, totals, RATE)
    elapsed, _, parts = engine.clock.lap()
    mine = torch.zeros(ranks.world_size)
    mine[ranks.rank] = ranks.rank + 1
    whole = sums.over_ranks(norms.squares, norms.histograms, mine)
    found = norms.describe(grad_norm) | {"grad_norm": grad_norm, "mine": mine.tolist()}
    found |= {"parts": parts, "elapsed": elapsed, "traffic": dispatched(engine.module)}
    after = gather_parameters(engine, plan, ranks)
    for kind in KINDS:
        names = [name for name in before if kind_of(name) == kind]
        changed = sum((after[name] - before[name]).double().square().sum().item() for name in names)
        found[f"size/{kind}"] = sum(before[name].numel() for name in names)
        found[f"changed/{kind}"] = changed**0.5
    dist.all_reduce(clones.squares)
    squares = (clones.squares / norms._replicas).tolist()
    found |= {f"cloned/{kind}": square**0.5 for kind, square in zip(KINDS, squares, strict=True)}
    found |= {"sums": whole.describe(totals), "load": whole.tokens_per_expert}
    engine.close()
    return found


def measure_all(many: list[list[str]]) -> list[dict]:
    return [measure(*overrides) for overrides in many]


@pytest.fixture(scope="module")
def oracle() -> dict:
    """The same step in one process: autograd over all rows at once, torch's AdamW."""
    config = small_config(f"micro_batch_size={ROWS}", "experts.backend=reference")
    model = oracle_model(config)
    (batch,) = micro_batches(config.plan(1), 0, 0)
    output = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.token_mask)
    loss = F.cross_entropy(output.logits.flatten(0, 1), batch.labels.flatten())
    tokens, statistics = batch.token_mask.sum(), output.router
    shares = statistics.tokens_per_expert.double() / (2 * tokens)
    balance = 8 * (shares * statistics.probability_sums.double() / tokens).sum(dim=1)
    (loss + 0.1 * balance.sum() + 0.01 * (statistics.z_sums / tokens).sum()).backward()
    sums = defaultdict(float)
    for name, parameter in model.named_parameters():
        sums["grad_norm", kind_of(name)] += parameter.grad.square().sum().item()
        sums["param_norm", kind_of(name)] += parameter.detach().square().sum().item()
    return {f"{what}/{kind}": total**0.5 for (what, kind), total in sums.items()} | {
        "range": statistics.logit_range.tolist(),
        "load": statistics.tokens_per_expert,
    }


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_layout_measures_the_same(oracle: dict, world_size: int) -> None:
    chosen = [
        [f"deepspeed=zero{stage}", f"micro_batch_size={ROWS // (2 * size)}", f"parallel.ep_size={ep_size}"]
        for size, stage, ep_size in LAYOUTS
        if size == world_size
    ]
    ranks = run_ranks(measure_all, world_size, chosen, timeout=280)
    for number, overrides in enumerate(chosen):
        found = ranks[0][number]
        assert all(f"update_ratio/{kind}" in found for kind in KINDS), overrides
        for kind in KINDS:
            for key in (f"grad_norm/{kind}", f"param_norm/{kind}"):
                assert found[key] == pytest.approx(oracle[key], rel=TOLERANCE), (overrides, key)
            ratio = found[f"changed/{kind}"] / found[f"param_norm/{kind}"]
            assert found[f"update_ratio/{kind}"] == pytest.approx(ratio, rel=1e-4), (overrides, kind)
            ratio = found[f"cloned/{kind}"] / found[f"param_norm/{kind}"]
            assert found[f"update_ratio/{kind}"] == pytest.approx(ratio, rel=TOLERANCE), (overrides, kind)
        assert found["mine"] == [rank + 1 for rank in range(world_size)]
        assert found["sums"]["layers"]["logit_range"] == pytest.approx(oracle["range"], rel=TOLERANCE)
        assert torch.equal(found["load"].float(), oracle["load"].float())
        # every nonzero gradient is counted in one bin
        counted = {kind: sum(row) for kind, row in found["gradient_histogram"].items()}
        assert counted["router"] == found["size/router"], overrides
        assert all(0 < counted[kind] <= found[f"size/{kind}"] for kind in KINDS), overrides
        # all parts of the step were measured, and together they take no longer than the step
        parts = found["parts"]
        assert set(parts) == {"communication", "forward", "backward", "optimizer"}
        assert min(parts.values()) > 0
        assert sum(parts.values()) <= found["elapsed"]
        # no slot is lost: all ranks together receive as many slots as they route
        _, routed, received = (
            sum(values) for values in zip(*(r[number]["traffic"] for r in ranks), strict=True)
        )
        assert routed == received > 0


def test_bf16_measures_the_update_of_the_fp32_weights() -> None:
    chosen = [
        ["dtype=bf16", f"deepspeed=zero{stage}", f"micro_batch_size={ROWS // 4}", "parallel.ep_size=2"]
        for stage in range(4)
    ]
    for found, overrides in zip(run_ranks(measure_all, 2, chosen)[0], chosen, strict=True):
        for kind in KINDS:
            ratio = found[f"cloned/{kind}"] / found[f"param_norm/{kind}"]
            assert found[f"update_ratio/{kind}"] == pytest.approx(ratio, rel=TOLERANCE), (overrides, kind)


PAUSE = 0.5


def measure_with_pause(waited_for: str) -> tuple[dict, float]:
    """The metrics of a step after which the run waited, and the seconds of all of it."""
    run = SmallRun("micro_batch_size=8", "tracker.log_every_steps=1")
    started = time.perf_counter()
    meter = Meter(run.config, run.ranks, run.engine, run.engine._engine.basic_optimizer, 0)
    meter.begin(1)
    batches = micro_batches(run.plan, run.ranks.rank, 0)
    totals = agree_on_totals(batches, False)
    meter.add(totals)
    sums, _, norm = train_step(run.engine, run.balance, Supervised.loss_shares, batches, totals, RATE)
    with run.engine.clock.wait(waited_for):
        time.sleep(PAUSE)
    metrics = meter.measure(1, sums, totals, norm, RATE, 0.0)
    elapsed = time.perf_counter() - started
    run.engine.close()
    return metrics, elapsed


@pytest.mark.parametrize(("waited_for", "counts"), [("evaluation", False), ("save", False), ("data", True)])
def test_evaluations_and_saves_are_not_part_of_a_step_and_waiting_for_data_is(waited_for, counts):
    ((metrics, elapsed),) = run_ranks(measure_with_pause, 1, waited_for)
    if counts:
        assert PAUSE < metrics["step_seconds"] <= elapsed
    else:
        assert metrics["step_seconds"] <= elapsed - PAUSE
    step_tokens = ROWS * SEQ_LEN
    assert metrics["tokens_per_second"] == pytest.approx(step_tokens / metrics["step_seconds"])
    assert metrics["tokens_per_second_mean"] < step_tokens / PAUSE, "the mean is over all the time"


def summed_over_ranks() -> StepSums:
    """Sums that differ on every rank and in every field, over all ranks."""
    rank = dist.get_rank()
    one = StepSums.zeros(2, 3, torch.device("cpu"))
    for number, field in enumerate(one):
        field.add_(10.0 ** (number % 3) * (rank + 1))
    one.logit_range.copy_(torch.tensor([5.0, 1.0] if rank == 0 else [2.0, 7.0]))
    return one.over_ranks()


def test_sums_and_ranges_are_those_of_all_ranks():
    for found in run_ranks(summed_over_ranks, 2):
        for number, name in enumerate(StepSums._fields):
            if name != "logit_range":
                assert (getattr(found, name) == 3 * 10.0 ** (number % 3)).all(), name
        assert found.logit_range.tolist() == [5.0, 7.0]
