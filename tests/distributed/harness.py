"""Runs a function of a test file on several gloo ranks, one process each, and returns its results."""

import faulthandler
import importlib.util
import inspect
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
START = 60.0  # seconds that a rank may take to start
TAIL = 8000  # characters of a failing rank's output
# of every rank; those that libraries read when they are imported hold from the start of the fork server on
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "CUDA_VISIBLE_DEVICES": "",  # the ranks use gloo on the CPU, even if the machine has GPUs
    "DS_ACCELERATOR": "cpu",  # also for tests that import DeepSpeed directly
}


def run_ranks(worker: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """What `worker(*args)`, a top-level function of a test file, returns on each rank.

    torch.distributed is initialised (gloo); RANK, LOCAL_RANK and WORLD_SIZE are set. If a rank fails or runs
    longer than `timeout` seconds, all are ended: AssertionError with its output, which shows where it hung.
    Each rank is a new process, forked from one that has imported `harness_imports` and done nothing else.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(args, folder / "args")
        source = str(inspect.getsourcefile(worker))
        ranks = [
            _start((source, worker.__name__, name, timeout), rank, world_size) for rank in range(world_size)
        ]
        try:
            failed = _wait(ranks, time.monotonic() + timeout + START)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        if failed:
            outputs = (f"--- rank {rank} ---\n{_log(folder, rank).read_text()[-TAIL:]}" for rank in failed)
            raise AssertionError(f"{worker.__name__} failed on {world_size} ranks\n" + "\n".join(outputs))
        return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def _log(folder: Path, rank: int) -> Path:
    return folder / f"log-{rank}"


def _start(work: tuple[str, str, str, float], rank: int, world_size: int) -> ForkServerProcess:
    before = dict(os.environ)
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness_imports"])
    os.environ.update(ENVIRONMENT)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        sys.path
    )  # the fork server of Python 3.11 is not told sys.path
    try:
        forkserver.ensure_running()
        process = context.Process(target=_run_rank, args=(*work, before | ENVIRONMENT | place))
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return process


def _wait(ranks: list[ForkServerProcess], deadline: float) -> list[int]:
    """The ranks that failed first, or those that still run at the deadline; empty if all succeeded."""
    while True:
        codes = [process.exitcode for process in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed or all(code == 0 for code in codes):
            return failed
        if time.monotonic() > deadline:
            return [rank for rank, code in enumerate(codes) if code is None]
        time.sleep(0.02)


def _run_rank(source: str, function: str, folder: str, timeout: float, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    log = os.open(_log(Path(folder), rank), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stderr.reconfigure(line_buffering=True)
    spec = importlib.util.spec_from_file_location("worker", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    faulthandler.dump_traceback_later(timeout, exit=True)  # shows where a rank hangs
    args = torch.load(f"{folder}/args", weights_only=False)
    torch.save(getattr(module, function)(*args), f"{folder}/result-{rank}")
    dist.barrier()  # no rank exits while another still communicates with it
    dist.destroy_process_group()
