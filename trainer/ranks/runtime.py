"""The setup of one rank: process group, device, random generators, output, garbage collection."""

import gc
import io
import logging
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.config import DataError
from moe.config import ConfigError
from trainer.ranks.device import check_devices, choose_device
from trainer.ranks.launch import STOP_SIGNALS, adopt_srun
from trainer.settings.secrets import redacted

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# A collective that waits longer fails: another rank has died or hangs.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
T = TypeVar("T")


class TrainingError(RuntimeError):
    """Training cannot go on: the message says at which step, where, and what to do."""


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of the run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    warning: str | None = None  # about the choice of the device

    @property
    def is_main(self) -> bool:
        """Whether this rank talks to the terminal and writes shared files."""
        return self.rank == 0

    @classmethod
    def join(cls, wanted: str = "auto") -> "Ranks":
        """Join the process group named by RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

        `wanted` is the key `device`. Raises ConfigError if a rank cannot use it, or shares its GPU.
        """
        rank, local_rank, world_size = (int(os.environ[key]) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        device, warning = choose_device(wanted, local_rank, ranks_here, world_size)
        gpu = None
        if device.type == "cuda":
            torch.cuda.set_device(device)
            os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed sets the device again from it
            gpu = str(torch.cuda.get_device_properties(device).uuid)
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=COLLECTIVE_TIMEOUT)
        check_devices(gpu)
        return cls(rank, local_rank, world_size, device, warning)

    @classmethod
    def of_command(cls, wanted: str = "auto") -> "Ranks":
        """This process of a command: a rank of those that --nproc, srun or torchrun started, or alone.

        Of several ranks only the first writes to the standard output.
        """
        adopt_srun()
        if "RANK" not in os.environ:
            device, warning = choose_device(wanted)
            return cls(0, 0, 1, device, warning)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # end at once: nothing to save
        ranks = cls.join(wanted)
        if not ranks.is_main:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.close(nowhere)
        return ranks

    def from_main(self, compute: Callable[[], T]) -> T:
        """What rank 0 computes, on every rank. Raises its ConfigError or DataError on every rank."""
        if self.world_size == 1:
            return compute()
        found: list[Any] = [None]
        if self.is_main:
            try:
                found[0] = compute()
            except (ConfigError, DataError) as error:
                found[0] = error
        dist.broadcast_object_list(found)
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        if self.world_size == 1:
            return flag
        both = torch.tensor(int(flag))  # in host memory
        dist.all_reduce(both)
        return bool(both)

    def leave(self) -> None:
        """Leave the process group after all ranks have arrived: one that left early could abort others."""
        if not dist.is_initialized():
            return
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)
        dist.destroy_process_group()


def seed_everything(seed: int, rank: int) -> None:
    """Seed every random generator: differently on each rank, equally in each attempt."""
    random.seed(seed + rank)
    np.random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def random_state() -> dict:
    """The state of every generator of this rank, of types that torch loads with weights_only=True."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():  # a run may resume on another `device`
        torch.cuda.set_rng_state(state["cuda"])


class _Guest(io.FileIO):
    """Drops output that cannot be written, so that a closed terminal or pipe does not end the run."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


class _Discreet(logging.Formatter):
    """Hides secrets, which errors of libraries may repeat, such as an address with a password."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def redirect_output(log_file: Path) -> TextIO:
    """Send file descriptors 1 and 2 (also used by C libraries) and Python logging to `log_file`.

    Returns the old standard output, for progress and errors that a person must see.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    terminal = io.TextIOWrapper(io.BufferedWriter(_Guest(os.dup(1), "w")), line_buffering=True)
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    handler = logging.StreamHandler()
    handler.setFormatter(_Discreet("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    return terminal


@contextmanager
def garbage_collected_by_hand() -> Iterator[None]:
    """Inside, Python frees cycles of objects only when gc.collect is called, at the same step on all ranks.

    Automatic collection pauses each rank at a different step for a fraction of a second; all others wait.
    """
    gc.collect()
    gc.freeze()  # exclude the objects that exist now from later collections
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
