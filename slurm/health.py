"""`python -m slurm.health REPORT_DIR ...`: one rank's check of its node, before training.

A rank leaves REPORT_DIR/<node>.<rank>: empty where all is well, else what is wrong with the node. A rank that
waits in vain for others does not blame its own node: those others leave no file, or blame theirs.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def check_device(gpus: int) -> list[str]:
    """Whether the node has its GPUs, and this rank's device computes a small product right."""
    count = torch.cuda.device_count()
    if count != gpus:
        return [f"{count} of {gpus} GPUs"]
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    a = torch.arange(256 * 256).view(256, 256) % 7  # small whole numbers: exact in fp32
    product = (a.to(device, torch.float32) @ a.to(device, torch.float32)).cpu()
    return [] if torch.equal(product, (a @ a).float()) else [f"wrong matrix product on {device}"]


def check_disk(folder: Path, min_free_gib: float) -> list[str]:
    """Whether a folder has room and can be written."""
    free = shutil.disk_usage(folder).free / 2**30
    if free < min_free_gib:
        return [f"{free:.1f} GiB free in {folder}, below slurm.health.min_free_gib={min_free_gib}"]
    with tempfile.TemporaryFile(dir=folder):
        return []


def check_collective(gpus: int, max_skew_seconds: float, timeout: timedelta) -> list[str]:
    """Whether this rank meets all others, an all-reduce is right, and clocks agree."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(address, port, world_size, rank == 0, timeout, wait_for_workers=False)
        store.set(f"rank {rank}", "here")
    except Exception as error:
        return [f"cannot reach {address}:{port} ({str(error).splitlines()[0]})"]
    try:
        store.wait([f"rank {other}" for other in range(world_size)], timeout)
    except Exception:
        return []  # another rank is missing, and its node the one to blame
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
        total = torch.full((1 << 16,), float(rank), device=device)
        dist.all_reduce(total)
        right = bool((total == world_size * (world_size - 1) / 2).all())
        clocks = [torch.zeros(1, dtype=torch.float64) for _ in range(world_size)]
        dist.all_gather(clocks, torch.tensor([time.time()], dtype=torch.float64))
    except Exception as error:
        return [f"the collective over all ranks failed ({str(error).splitlines()[0]})"]
    skew = float(clocks[rank] - torch.cat(clocks).median())
    problems = [] if right else ["a wrong sum in the collective over all ranks"]
    if abs(skew) > max_skew_seconds:
        problems.append(f"the clock is {skew:+.0f} s off")
    return problems


def main() -> None:
    """Check, and leave the report."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parser = argparse.ArgumentParser()
    parser.add_argument("report", type=Path)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--min-free-gib", type=float, required=True)
    parser.add_argument("--max-skew-seconds", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    problems = []
    for check in (
        lambda: check_device(given.gpus),
        lambda: check_disk(given.report, given.min_free_gib),
        lambda: check_disk(Path(tempfile.gettempdir()), given.min_free_gib),
    ):
        try:
            problems += check()
        except Exception as error:  # whatever it is, the node is not well
            problems.append(str(error).splitlines()[0])
    problems += check_collective(given.gpus, given.max_skew_seconds, timedelta(seconds=given.seconds))
    host = os.environ["SLURMD_NODENAME"]
    (given.report / f"{host}.{os.environ['RANK']}").write_text("".join(f"{line}\n" for line in problems))
    sys.stdout.flush()
    os._exit(0)  # a process group that others have left may block at exit


if __name__ == "__main__":
    main()
