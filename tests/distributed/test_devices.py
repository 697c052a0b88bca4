"""Before a model is built, ranks check that each has its own device and that all are of one kind."""

import os

import torch.distributed as dist
from harness import run_ranks

from moe.config import ConfigError
from trainer.ranks.device import check_devices

CASES: dict[str, list[str | None]] = {
    "one each": ["GPU-a", "GPU-b"],
    "none": [None, None],
    "shared": ["GPU-a", "GPU-a"],
    "mixed": ["GPU-a", None],
}


def problems() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, gpus in CASES.items():
        try:
            check_devices(gpus[dist.get_rank()])
        except ConfigError as error:
            found[name] = error.problems
    return found


def test_ranks_share_no_gpu_and_all_or_none_have_one():
    first, second = run_ranks(problems, 2)
    assert first == second, "every rank must report the problem, so that none waits for the others"
    assert first.keys() == {"shared", "mixed"}
    host = os.uname().nodename
    (shared,), (mixed,) = first["shared"], first["mixed"]
    assert shared.startswith(f"parallel.nproc_per_node: ranks 0, 1 share one GPU of {host}; use as many")
    assert mixed.startswith(f"device: CUDA works on some machines of this run, but not on {host}; repair")
