"""The table of collectives that `trainer.profile` prints."""

import deepspeed.comm
import torch
from harness import run_ranks

from trainer.engine.engine import all_to_all, communication_log, init_deepspeed


def log_of_a_few() -> str:
    init_deepspeed(torch.device("cpu"))
    half, other = torch.zeros(2**17), torch.zeros(2**17)  # fp32: 0.5 MiB

    def run() -> None:
        for _ in range(3):
            deepspeed.comm.all_reduce(half)
        deepspeed.comm.all_reduce(half[:2])
        all_to_all(other, half)

    deepspeed.comm.all_reduce(half)  # before: not logged
    return communication_log(run)


def test_calls_and_bytes_are_summed_over_sizes() -> None:
    for log in run_ranks(log_of_a_few, 2):
        head, *rows = [line.split() for line in log.splitlines()]
        assert head == ["collective", "calls", "MiB", "ms"]
        assert {name: (calls, size) for name, calls, size, _ in rows} == {
            "all_reduce": ("4", "1.50"),
            "all_to_all_single": ("1", "0.50"),
        }
        times = [float(row[3]) for row in rows]
        assert times == sorted(times, reverse=True)
        assert min(times) > 0
