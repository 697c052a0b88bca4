"""Gradients in bf16 are summed in fp32, over micro-batches and over ranks, under every ZeRO stage.

The gradient of every weight is replaced: 256 in the first micro-batch of rank 0, 1 in all others. Between 256
and 512 bf16 has only even numbers, so a sum in bf16 would lose every 1 that is added to 256.
"""

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from layouts import SmallRun

from trainer.engine.gradients import clip
from trainer.engine.optimizer import KINDS

LARGE, MICRO_BATCHES = 256, 4
OVERRIDES = ["dtype=bf16", "micro_batch_size=2", "optimizer.max_grad_norm=0"]


def sums_of_a_step(*overrides: str) -> dict[str, list[float]]:
    """The distinct nonzero values in this rank's gradients, by kind of parameter (0 is padding)."""
    run = SmallRun(*OVERRIDES, *overrides)
    scale = run.engine._averaged_over  # DeepSpeed divides by this; `backward` multiplies the loss by it
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    def replaced(gradient: torch.Tensor) -> torch.Tensor:
        first = forwards == 1 and dist.get_rank() == 0
        return torch.full_like(gradient, (LARGE if first else 1) * scale)

    found: dict[str, set[float]] = {kind: set() for kind in KINDS}

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    found[group["kind"]] |= set(parameter.grad.unique().tolist())

    for parameter in run.engine.module.parameters():
        parameter.register_hook(replaced)
    run.engine.module.register_forward_pre_hook(count)
    run.engine._engine.basic_optimizer.register_step_pre_hook(look)
    assert run.plan.gradient_accumulation_steps == MICRO_BATCHES
    (norm,) = run.train(range(1))["grad_norms"]
    leftovers = [name for name, p in run.engine.module.named_parameters() if p.grad is not None]
    run.engine.close()
    assert not leftovers
    assert norm > LARGE
    return {kind: sorted(values - {0.0}) for kind, values in found.items() if values}


def both_layouts(stage: int) -> list[dict[str, list[float]]]:
    mode = "balance.mode=micro_batch"  # one forward for each micro-batch
    return [sums_of_a_step(f"deepspeed=zero{stage}", mode, f"parallel.ep_size={ep}") for ep in (1, 2)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sums_of_bf16_gradients_are_exact(stage):
    together = LARGE + 2 * MICRO_BATCHES - 1
    for rank, (whole, spread) in enumerate(run_ranks(both_layouts, 2, stage)):
        shared = {kind: [together] for kind in ("router", "attention", "embedding", "other")}
        assert whole == shared | {"experts": [together]}
        own = MICRO_BATCHES + (LARGE - 1 if rank == 0 else 0)  # no other rank holds these experts
        assert spread == shared | {"experts": [own]}


def leftovers_of_an_idle_weight(stage: int) -> list[float]:
    """The largest gradient of a weight in each of three steps; in the second it takes part in no backward."""
    run = SmallRun(*OVERRIDES, f"deepspeed=zero{stage}", "parallel.ep_size=2", "balance.mode=micro_batch")
    idle = run.engine.module.model.norm.weight
    found: list[float] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        held = run.engine._locate(idle)
        squares = torch.zeros(())
        if held is not None:
            flat, offset, _, numel = held
            squares = flat.grad.flatten()[offset : offset + numel].square().sum()
        dist.all_reduce(squares)
        found.append(float(squares))

    run.engine._engine.basic_optimizer.register_step_pre_hook(look)
    for step in range(3):
        idle.requires_grad_(step != 1)
        run.train(range(step, step + 1))
    run.engine.close()
    return found


@pytest.mark.parametrize("stage", [0, 1])
def test_a_weight_without_a_gradient_keeps_none_of_the_last_step(stage):
    for first, idle, last in run_ranks(leftovers_of_an_idle_weight, 2, stage):
        assert first > 0
        assert idle == 0
        assert last > 0


def clipped_norms(stage: int, fused: bool) -> tuple[list[float], list[float]]:
    """The norm of the gradients before clipping, and when the optimizer has stepped, of some steps."""
    overrides = [f"deepspeed=zero{stage}", f"optimizer.max_grad_norm={LIMIT}", "optimizer.lr=0.02"]
    run = SmallRun(*OVERRIDES[:2], *overrides)
    optimizer = run.engine._engine.basic_optimizer
    for settings in (optimizer.defaults, *optimizer.param_groups):
        settings["fused"] = fused
    after = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        squares = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        if stage > 0:  # each rank holds a part
            dist.all_reduce(squares)
        after.append(float(squares.sqrt()))

    optimizer.register_step_post_hook(look)
    before = run.train(range(8))["grad_norms"]
    run.engine.close()
    return before, after


LIMIT = 0.55  # some norms of these steps lie above, some below


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("stage", [0, 1])
def test_gradients_are_clipped_once_and_only_where_they_are_too_large(stage, fused):
    before, after = run_ranks(clipped_norms, 2, stage, fused)[0]
    assert min(before) < LIMIT < max(before)
    assert after == pytest.approx([min(norm, LIMIT) for norm in before], rel=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_the_next_step_is_not_clipped_by_the_last(fused):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=fused)
    optimizer.defaults["fused"] = fused
    for norm, seen in ((4.0, 0.25), (0.5, 1.0), (2.0, 0.5)):
        weight.grad = torch.ones(3)
        clip(optimizer, [weight.grad], norm, max_norm=1.0)
        optimizer.step()
        assert weight.grad.tolist() == pytest.approx([seen] * 3, rel=1e-5)
