"""Peak FLOP/s of a device, memory of a rank, and available memory of its host."""

import re
import resource
import time
from contextlib import suppress
from pathlib import Path

import torch

from trainer.engine.clock import synchronize

# Dense bf16 peak in FLOP/s from vendor data sheets, by a part of the device's name; the first match counts.
_PEAKS = {"GB200": 2.5e15, "B300": 2.25e15, "B200": 2.25e15, "H200": 989e12}  # GH200 too
_PEAKS |= {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12, "H20": 148e12}
_PEAKS |= {"A100": 312e12, "A800": 312e12, "L40S": 362e12, "MI300X": 1307e12}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s of one rank's device: from the table for known GPUs in bf16, else measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if known := [peak for part, peak in _PEAKS.items() if part in name]:
            return known[0]
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_gib(device: torch.device) -> dict[str, float]:
    """Peak memory of this rank so far: allocated and reserved on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return {
            "memory_gib": torch.cuda.max_memory_allocated(device) / 2**30,
            "memory_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
        }
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def available_memory() -> int:
    """Bytes of host memory still available, within the limits of all cgroups; 0 if unknown."""
    rooms = []
    with suppress(OSError):
        meminfo = Path("/proc/meminfo").read_text()
        rooms.append(1024 * int(meminfo.partition("MemAvailable:")[2].split()[0]))
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            limit = "memory.limit_in_bytes" if controllers else "memory.max"  # cgroup version 1, version 2
            group = Path(f"/sys/fs/cgroup/{'memory' if controllers else ''}{path}")
            for folder in (group, *group.parents):
                with suppress(OSError, ValueError, IndexError):  # another controller, or no limit
                    used = re.findall(r"(?m)^(?:anon|total_rss) (\d+)", (folder / "memory.stat").read_text())
                    rooms.append(int((folder / limit).read_text()) - int(used[0]))
    return min(rooms, default=0)
