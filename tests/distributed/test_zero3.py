"""ZeRO-3 gathers in the same order on all ranks, in whatever order DeepSpeed asks for parameters."""

import torch
import torch.distributed as dist
from harness import run_ranks
from layouts import SmallRun

RELEASED = "++deepspeed.zero_optimization.stage3_param_persistence_threshold=0"


def gathers_of_both_groups() -> tuple[list[str], bool]:
    """The gathers, one for each group of ranks, of all parameters; rank 1 asks for the experts first."""
    run = SmallRun("deepspeed=zero3", "micro_batch_size=8", "parallel.ep_size=2", RELEASED)
    named = dict(run.engine.module.named_parameters())
    names = sorted(named, key=lambda name: ".experts." in name, reverse=dist.get_rank() == 1)
    asked = [named[name] for name in names]
    gathers = asked[0].all_gather_coalesced(asked)
    gathers.wait()
    whole = all(one.shape == one.ds_shape and torch.isfinite(one).all() for one in asked)
    asked[0].partition(asked)
    run.engine.close()
    return [type(one).__name__ for one in gathers.handles], whole


def test_ranks_gather_in_one_order():
    """Two ranks that begin with different groups could wait for each other forever."""
    first, second = run_ranks(gathers_of_both_groups, 2)
    assert first == second
    assert len(first[0]) == 2
    assert first[1]
