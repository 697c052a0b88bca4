"""`python -m slurm.health REPORT_DIR ...`: one rank's check of its node, before training.

A rank writes REPORT_DIR/<node>.<rank>: empty if all is well, else what is wrong with the node. A rank whose
wait for other ranks times out does not report its own node: the other ranks write no file, or report theirs.
"""

import os
import shutil
import signal
import sys
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

_BOUND = (
    "health: every task sees one GPU only, and NCCL may be unable to use NVLink within a node; "
    "leave out --gpus-per-task and --gpu-bind if training is slow"
)


def check_device(gpus: int, device: torch.device) -> list[str]:
    """Check that this rank sees all GPUs of its node, or one of its own, and computes a product correctly."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if gpus and "MIG-" in visible and int(os.environ["WORLD_SIZE"]) > 1:
        return [f"{visible} is a part of a GPU, and NCCL joins whole GPUs; request whole GPUs, or one rank"]
    bound = gpus > 1 and visible != "" and "," not in visible
    if (count := torch.cuda.device_count()) != (1 if bound else gpus):
        return [f"{count} GPUs, not slurm.gpus_per_node={gpus}"]
    if bound and os.environ["RANK"] == "0":
        print(_BOUND, flush=True)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else a CUDA context opens on GPU 0 too
    a = torch.arange(256 * 256).view(256, 256) % 7  # small whole numbers: exact in fp32
    product = (a.to(device, torch.float32) @ a.to(device, torch.float32)).cpu()
    return [] if torch.equal(product, (a @ a).float()) else [f"wrong matrix product on {device}"]


def check_disk(folder: Path, min_free_gib: float) -> list[str]:
    """Check that a folder has enough space and can be written (else raises OSError)."""
    free = shutil.disk_usage(folder).free / 2**30
    if free < min_free_gib:
        return [f"{free:.1f} GiB free in {folder}, below slurm.health.min_free_gib={min_free_gib}"]
    with tempfile.TemporaryFile(dir=folder):
        return []


def check_collective(device: torch.device, max_skew_seconds: float, timeout: timedelta) -> list[str]:
    """Check that this rank reaches all others, an all-reduce is correct, and clocks agree."""
    rank, world_size, port = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    address = os.environ["MASTER_ADDR"]
    try:
        store = dist.TCPStore(address, port, world_size, rank == 0, timeout, wait_for_workers=False)
        store.set(f"rank {rank}", "here")
    except Exception as error:
        return [f"cannot reach {address}:{port} ({_brief(error)})"]
    try:
        store.wait([f"rank {other}" for other in range(world_size)], timeout)
    except Exception:
        return []  # another rank is missing: its node is reported, not this one
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        total = torch.full((1 << 16,), float(rank), device=device)
        dist.all_reduce(total)
        clocks = [torch.zeros(1, dtype=torch.float64) for _ in range(world_size)]
        dist.all_gather(clocks, torch.tensor([time.time()], dtype=torch.float64))
    except Exception as error:
        return [f"the collective over all ranks failed ({_brief(error)})"]
    if not (total == world_size * (world_size - 1) / 2).all():
        return ["a wrong sum in the collective over all ranks"]
    skew = float(clocks[rank] - torch.cat(clocks).median())
    return [f"the clock is {skew:+.0f} s off"] if abs(skew) > max_skew_seconds else []


def main(report: Path, seconds: int, gpus: int, min_free_gib: float, max_skew_seconds: float) -> None:
    """Run all checks and write the report; waits at most `seconds` for other ranks."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    checks = [partial(check_device, gpus, device), partial(check_disk, report, min_free_gib)]
    checks.append(partial(check_disk, Path(tempfile.gettempdir()), min_free_gib))
    checks.append(partial(check_collective, device, max_skew_seconds, timedelta(seconds=seconds)))
    problems = []
    for check in checks:
        try:
            problems += check()
        except Exception as error:  # any error means a bad node
            problems.append(_brief(error))
    name = f"{os.environ['SLURMD_NODENAME']}.{os.environ['RANK']}"
    (report / name).write_text("".join(f"{line}\n" for line in problems))


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5]))
    os._exit(0)  # a process group that others have left may block at exit
