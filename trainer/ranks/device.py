"""The device of a rank, chosen before anything is built, and the remedy if it cannot be used."""

import os
import re
import socket
import warnings
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import deterministic

from moe.config import ConfigError
from trainer.ranks.launch import NO_GPUS, sees_gpu

_OLDER_CUDA = "https://download.pytorch.org/whl/cu126"


def choose_device(
    wanted: str, local_rank: int = 0, ranks_here: int = 1, world_size: int = 1
) -> tuple[torch.device, str | None]:
    """The device of rank `local_rank` of the `ranks_here` on this machine, and a warning if one is needed.

    `wanted` is the key `device`; raises ConfigError if it cannot be used. Call this before anything uses
    CUDA: "cpu" hides the GPUs from this process, so that nothing, DeepSpeed included, opens a context.
    """
    if wanted == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return torch.device("cpu"), None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if obstacle := _obstacle(visible):
        if wanted == "cuda":
            raise ConfigError([f"device=cuda cannot be used: {obstacle}; or use device=cpu"])
        return torch.device("cpu"), f"training on the CPU: {obstacle}" if sees_gpu(wanted) else None

    count, ranks_here = torch.cuda.device_count(), max(ranks_here, local_rank + 1)
    # Some clusters show each task only its own GPU; `check_devices` checks that no two ranks share it.
    one_each = count == 1 and bool(visible) and "," not in str(visible)
    if ranks_here > count and not one_each:
        shown = f"{count} GPU{'s' * (count > 1)}" + (f" (CUDA_VISIBLE_DEVICES={visible})" if visible else "")
        remedy = f"use {count}, or device=cpu to train on the CPU"
        asked = f"{ranks_here} ranks (parallel.nproc_per_node or --nproc)"
        raise ConfigError([f"{asked} but this machine has {shown}; {remedy}"])
    device = torch.device("cuda", 0 if one_each else local_rank)
    name = torch.cuda.get_device_name(device)
    if world_size > 1 and ("MIG" in name or str(visible).startswith("MIG-")):
        why = f"{world_size} ranks on MIG instances ({name}): NCCL connects whole GPUs only"
        raise ConfigError([f"{why}; use one rank, or GPUs without MIG"])
    return device, None


def _obstacle(visible: str | None) -> str | None:
    """Why CUDA cannot be used in this process, and the remedy; None if it can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the text below replaces torch's warning
        if torch.cuda.is_available():
            return None
    if visible in NO_GPUS:
        return f"CUDA_VISIBLE_DEVICES={visible} hides every GPU; unset it"
    if not sees_gpu("auto"):
        return "this machine shows no NVIDIA GPU (/dev/nvidia0)"
    version = torch.__version__.partition("+")[0]
    install = f"pip install --force-reinstall torch=={version}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; `{install}`"
    try:
        torch.cuda.init()
        said = "no device answers"
    except Exception as error:
        said = " ".join(str(error).split())
    built = (
        f"torch {version} is built for CUDA {torch.version.cuda} and finds driver {driver_version()}: {said}"
    )
    newer = "update the driver (CUDA 13 needs 580 or newer)"
    return f"{built}; {newer}, or `{install} --index-url {_OLDER_CUDA}`"


def driver_version() -> str | None:
    """The version of NVIDIA's driver, such as 580.95.05; None if the kernel reports none."""
    with suppress(OSError):
        found = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
        return found[0] if found else None
    return None


def check_devices(gpu: str | None) -> None:
    """Raises ConfigError on every rank if two ranks share a GPU, or if only some ranks have one.

    `gpu`: UUID of this rank's GPU, None on a CPU. Every rank must call it, after joining the process group.
    """
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (socket.gethostname(), gpu))
    ranks_of = defaultdict(list)
    for rank, place in enumerate(everywhere):
        ranks_of[place].append(str(rank))
    without = sorted(host for host, gpu in ranks_of if gpu is None)
    problems = []
    if 0 < len(without) < len(ranks_of):
        what = f"device: CUDA works on some machines of this run, but not on {', '.join(without)}"
        problems.append(f"{what}; repair or leave out the latter, or use device=cpu")
    for (host, gpu), ranks in ranks_of.items():
        if gpu is not None and len(ranks) > 1:
            what = f"parallel.nproc_per_node: ranks {', '.join(ranks)} share one GPU of {host}"
            problems.append(f"{what}; use as many ranks as GPUs, or device=cpu")
    if problems:
        raise ConfigError(problems)


def device_name(device: torch.device) -> str:
    """The vendor's name of a GPU, such as NVIDIA H100 80GB HBM3; "the CPU" for any CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def device_facts(device: torch.device) -> dict[str, Any]:
    """What a rank's results may depend on, to be recorded: host, device, versions of torch, CUDA and NCCL."""
    facts: dict[str, Any] = {"host": socket.gethostname(), "torch": torch.__version__}
    facts |= {"device": device_name(device), "device_count": 0}
    if device.type == "cuda":
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        facts |= {"device_count": torch.cuda.device_count(), "cuda": torch.version.cuda, "nccl": nccl}
        facts |= {"driver": driver_version(), "compute_capability": torch.cuda.get_device_capability(device)}
    return facts


def use_deterministic_algorithms() -> None:
    """Make equal inputs give equal bits, also on a GPU; operations that cannot do so raise RuntimeError.

    Call this before the first matrix product and collective: cuBLAS and NCCL read their settings then.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # sums inside the NVLink switch have no fixed order
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # no code reads such memory
