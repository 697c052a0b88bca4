"""The table of `python -m trainer.models` against the tensors that a real engine holds."""

import gc
import weakref
from itertools import product

import pytest
import torch
from harness import run_ranks
from layouts import SmallRun

from trainer.models import bytes_per_rank

# many small tensors, so that batches and one gradient that a hook of DeepSpeed still holds hardly count
LARGER = ["model.hidden_size=128", "model.num_attention_heads=4", "model.head_dim=64", "model.vocab_size=512"]
LARGER += ["model.num_hidden_layers=8", "model.num_experts=16", "model.moe_intermediate_size=32"]
# the table counts DeepSpeed's buffers separately
ZERO = "++deepspeed.zero_optimization"
NO_BUFFERS = [f"{ZERO}.reduce_bucket_size=10000", f"{ZERO}.sub_group_size=10000"]
NO_BUFFERS += [f"{ZERO}.stage3_param_persistence_threshold=1000"]


def tensors() -> list[torch.Tensor]:
    """All tensors of this process."""
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]


def bytes_of(found: list[torch.Tensor], but: list[torch.Tensor]) -> tuple[int, list]:
    """Bytes of the storages of tensors `found`, without those of `but`; the largest with shapes."""
    storages, others = (
        {of.untyped_storage().data_ptr(): (of.untyped_storage().nbytes(), tuple(of.shape)) for of in some}
        for some in (found, but)
    )
    held = [storage for place, storage in storages.items() if place not in others]
    return sum(nbytes for nbytes, _ in held), sorted(held, reverse=True)[:24]


def held_at_most(dtype: str, stage: int, ep_size: int) -> tuple[int, list, float]:
    """The most bytes that this rank holds after a backward of its second step, and what the table says.

    Between the two, the largest tensors, to tell what a failure holds too much.
    """
    before = [weakref.ref(tensor) for tensor in tensors()]  # weak: those of an earlier engine may be freed
    layout = [f"dtype={dtype}", f"deepspeed=zero{stage}", f"parallel.ep_size={ep_size}", "micro_batch_size=4"]
    run = SmallRun(*LARGER, *layout, *(NO_BUFFERS if stage else []))
    step, seen = run.engine._engine.step, []

    def look_and_step() -> None:  # called after every micro-batch
        still = [tensor for ref in before if (tensor := ref()) is not None]
        # gc does not list gradients that no Python code has accessed: they are no Python objects yet
        gradients = [p.grad for p in run.engine.module.parameters() if p.grad is not None]
        seen.append(bytes_of([*tensors(), *gradients], still))
        step()

    run.train(range(1))
    run.engine._engine.step = look_and_step
    run.train(range(1, 2))
    model, world_size = run.config.model, run.ranks.world_size
    sizes = bytes_per_rank(model, zero_stage=stage, ep_size=ep_size, world_size=world_size, dtype=dtype)
    run.engine.close()
    return *max(seen), sum(sizes)


def held_by_all(cases: list[tuple]) -> list[tuple[int, list, float]]:
    return [held_at_most(*case) for case in cases]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_rank_holds_what_the_table_says(dtype):
    cases = list(product([dtype], (0, 1, 2, 3), (1, 2)))
    for rank in run_ranks(held_by_all, 2, cases, timeout=240):
        for case, (held, largest, said) in zip(cases, rank, strict=True):
            assert abs(held / said - 1) < 0.02, (case, held, said, largest)
