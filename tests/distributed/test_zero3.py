"""What trainer/engine/zero3.py changes in how DeepSpeed gathers the weights that it has partitioned."""

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from layouts import SmallRun, micro_batches

# ZeRO-3 would never release the small weights of this model, nor one that it needs again soon
_ZERO3 = "++deepspeed.zero_optimization.stage3"
RELEASED = [f"{_ZERO3}_param_persistence_threshold=0", f"{_ZERO3}_max_reuse_distance=0"]
SETTINGS = ["deepspeed=zero3", "micro_batch_size=8", "parallel.ep_size=2", *RELEASED]


def gathers_of_both_groups() -> tuple[list[str], bool]:
    """The gathers, one for each group of ranks, of all parameters; rank 1 asks for the experts first."""
    run = SmallRun(*SETTINGS)
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


def forwards_with_whole_weights() -> tuple[list[set[bool]], list[list[float]]]:
    """Which parameters are whole after each of two forwards inside, outside, and after a forward there; the
    losses of steps with and without all this."""
    whole, losses = [], []
    for gathers in (True, False):
        run = SmallRun(*SETTINGS)
        batch = micro_batches(run.plan, run.ranks.rank, 0)[0]
        place = (batch.input_ids, batch.position_ids, batch.cu_seqlens)
        parameters = list(run.engine.module.parameters())

        def look(parameters: list = parameters) -> None:
            whole.append({one.shape == one.ds_shape for one in parameters})

        if gathers:
            with run.engine.gathered(True):
                for _ in range(2):
                    run.engine.apply(*place)
                    look()
            look()
            run.engine.apply(*place)
            look()
        losses.append(run.train(range(2))["losses"])
        run.engine.close()
    return whole, losses


def test_weights_stay_whole_over_many_forwards_and_afterwards_no_longer():
    for whole, (after, without) in run_ranks(forwards_with_whole_weights, 2):
        assert whole == [{True}, {True}, {False}, {False}]
        assert after == pytest.approx(without, rel=1e-6)
