"""Gradients in bf16 are summed in fp32, over micro-batches and over ranks, under every ZeRO stage.

The gradient of every weight is replaced: 256 in the first micro-batch of rank 0, 1 in all others. Between 256
and 512 bf16 has only even numbers, so a sum in bf16 would lose every 1 that is added to 256.
"""

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from layouts import SmallRun

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
