"""What a node must pass, on real gloo ranks of this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

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
    """The reports by node; a node whose lateness is None does not come."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(len(lateness)), "LOCAL_RANK": "0"}
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
