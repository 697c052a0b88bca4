"""The health check of nodes, with real gloo ranks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slurm.health import check_device

# one rank on a node of its own; `late` seconds are added to its clock
RANK = """
import sys, time, pathlib
from slurm import health
late, real = float(sys.argv[1]), time.time
health.time.time = lambda: real() + late
health.main(pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]), 10.0)
"""


def check(
    folder: Path, lateness: list[float | None], seconds: int = 60, gpus: int = 0, free: float = 0.0
) -> dict[str, str]:
    """The reports by node; a node whose lateness is None is not started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(len(lateness)), "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *map(str, (late, folder, seconds, gpus, free))],
            env={**shared, "RANK": str(rank), "SLURMD_NODENAME": f"node{rank}"},
            cwd=Path(__file__).parents[3],
        )
        for rank, late in enumerate(lateness)
        if late is not None
    ]
    try:
        for rank in ranks:
            rank.wait(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_well(tmp_path):
    assert check(tmp_path, [0, 0]) == {"node0.0": "", "node1.1": ""}


def test_a_wrong_clock_is_the_fault_of_its_node(tmp_path):
    reports = check(tmp_path, [0, 0, -60])
    assert reports["node0.0"] == reports["node1.1"] == ""
    assert "the clock is -60 s off" in reports["node2.2"]


def test_who_waits_in_vain_does_not_blame_itself(tmp_path):
    assert check(tmp_path, [0, None], seconds=5) == {"node0.0": ""}


def test_missing_gpus_and_a_full_disk(tmp_path):
    reports = check(tmp_path, [0], gpus=7, free=1e9)
    assert "GPUs, not slurm.gpus_per_node=7" in reports["node0.0"]
    assert f"GiB free in {tmp_path}, below slurm.health.min_free_gib" in reports["node0.0"]


MIG = "is a part of a GPU, and NCCL joins whole GPUs; request whole GPUs, or one rank"
CPU = torch.device("cpu")  # computes in place of a GPU


@pytest.mark.parametrize(
    ("visible", "seen", "problem"),
    [
        ("0,1,2,3,4,5,6,7", 8, None),
        ("0,1,2,3,4,5,6,7", 7, "7 GPUs, not slurm.gpus_per_node=8"),
        ("", 8, None),
        ("", 1, "1 GPUs, not slurm.gpus_per_node=8"),
        ("3", 1, None),
        ("GPU-5fd4", 1, None),
        ("3", 0, "0 GPUs, not slurm.gpus_per_node=8"),
        (
            "MIG-5fd4",
            1,
            f"MIG-5fd4 {MIG}",
        ),
    ],
)
def test_the_gpus_that_a_rank_must_see(visible, seen, problem, monkeypatch, capsys):
    """All GPUs of the node, or the one to which SLURM has bound the task, which is reported once."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert check_device(8, CPU) == ([problem] if problem else [])
    bound = seen == 1 and problem is None
    assert capsys.readouterr().out.count("leave out --gpus-per-task and --gpu-bind") == int(bound)


def test_a_single_rank_may_use_a_part_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for key, value in {"WORLD_SIZE": "1", "RANK": "0", "CUDA_VISIBLE_DEVICES": "MIG-5fd4"}.items():
        monkeypatch.setenv(key, value)
    assert check_device(1, CPU) == []


def test_a_rank_opens_no_context_on_the_gpu_of_another(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    chosen = []

    def choose(device: torch.device) -> None:
        chosen.append(device)
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "set_device", choose)
    with pytest.raises(InterruptedError):
        check_device(8, torch.device("cuda", 3))
    assert chosen == [torch.device("cuda", 3)]
