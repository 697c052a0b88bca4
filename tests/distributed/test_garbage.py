"""Garbage is collected only when a checkpoint is saved, so no tensor may be left in a reference cycle."""

import gc
from contextlib import suppress

import pytest
import torch
from harness import run_ranks
from layouts import FAMILY, SmallRun

from trainer.ranks.runtime import garbage_collected_by_hand


def tensors_in_cycles(*overrides: str) -> tuple[int, list[tuple[int, ...]]]:
    """How many objects three steps leave to the garbage collector, and the shapes of tensors among them."""
    run = SmallRun("micro_batch_size=4", *overrides)
    run.train(range(1))
    gc.collect()
    gc.disable()
    run.train(range(1, 4))
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    found = len(gc.garbage), [tuple(left.shape) for left in gc.garbage if isinstance(left, torch.Tensor)]
    gc.garbage.clear()
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "deepspeed=zero1",
            "dtype=bf16",
            "recompute=full",
            "parallel.ep_size=2",
            "parallel.dispatch_chunks=2",
        ],
        ["deepspeed=zero3", "recompute=experts", *FAMILY["qwen3_next"]],
    ],
    ids=["zero1", "zero3"],
)
def test_no_tensor_waits_for_the_collector(overrides: list[str]) -> None:
    for objects, tensors in run_ranks(tensors_in_cycles, 2, *overrides):
        assert tensors == []
        assert objects < 10_000, "too much garbage for the thousands of steps between checkpoints"


def test_the_collector_is_as_before_however_training_ends() -> None:
    with suppress(KeyError), garbage_collected_by_hand():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
