"""Before a model is built, ranks check their devices, and whether groups of experts share a host."""

import os
import socket
from typing import Any

import torch.distributed as dist
from harness import run_ranks
from layouts import small_config

from moe.config import ConfigError
from trainer.ranks.device import check_devices
from trainer.train import check_hosts

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


HOSTS = ["one", "one", "one", "two"]


def groups_on_hosts() -> list[tuple[list[str], list[str], list[str]]]:
    """Hosts, what is said, and the problems, for groups of 1, 2 and 4 ranks that may span hosts or not."""
    socket.gethostname = lambda: HOSTS[dist.get_rank()]
    found = []
    for ep_size in (1, 2, 4):
        for within in (False, True):
            settings = ("micro_batch_size=1", f"parallel.ep_size={ep_size}")
            config = small_config(*settings, f"parallel.ep_within_node={within}")
            said: list[str] = []
            hosts: list[str] = []
            problems: list[str] = []
            screen: Any = type("Screen", (), {"say": staticmethod(said.append)})
            try:
                hosts = check_hosts(config, config.plan(4), screen)
            except ConfigError as error:
                problems = error.problems
            found.append((hosts, said, problems))
    return found


def test_groups_of_experts_across_hosts_are_a_warning_or_an_error() -> None:
    for found in run_ranks(groups_on_hosts, 4):
        assert found[:2] == [(HOSTS, [], [])] * 2, "groups of one rank span nothing"
        for number, where in ((2, "ranks 2-3 on one, two"), (4, "ranks 0-3 on one, two")):
            hosts, (said,), problems = found[number]
            assert (hosts, problems) == (HOSTS, [])
            assert f"expert-parallel groups span nodes, which is slow: {where}" in said
            hosts, nothing, (problem,) = found[number + 1]
            assert (hosts, nothing) == ([], [])
            assert problem.startswith(f"parallel.ep_size={number} spans nodes ({where})")
