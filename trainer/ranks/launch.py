"""Start the ranks of a run on this machine and wait for them; how a rank is asked to stop. Torch-free."""

import ctypes
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from trainer.settings.config import RunConfig
from trainer.settings.run_folder import read_state, write_state

_DEVICES = Path("/dev")
NO_GPUS = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that hide all GPUs; the last is SLURM's
_GRACE_SECONDS = 10.0  # for the other ranks to end, once one has failed
# Keep large freed blocks instead of returning them to the system: page faults cost a fifth of the time of a
# step on a CPU. Not for runs on GPUs: there every rank would keep the memory of its checkpoint copy.
ON_CPU = {"MALLOC_MMAP_THRESHOLD_": str(8 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
# The number of rows per expert differs in every step: segments that can grow avoid fragmentation.
_ON_GPU = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)  # SIGUSR1 is used by NCCL


class StopRequest:
    """Records a stop signal; the training loop makes all ranks agree on it."""

    def __init__(self) -> None:
        self.requested = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked by the launcher until now

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def sees_gpu(device: str) -> bool:
    """Whether `device` (auto, cuda or cpu) allows a GPU and /dev lists one; torch may still reject it."""
    hidden = device == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") in NO_GPUS
    return not hidden and any(_DEVICES.glob("nvidia[0-9]*"))


def start(run_dir: Path, config: RunConfig, held: int, written: list[Path]) -> int:
    """Start the ranks of a frozen run, given its lock `held`; if they fail, print where the logs are.

    `written`: the files that record this request. If the ranks refuse it before the attempt begins (because
    this machine has too few GPUs, for example), they are removed, so that another try may differ.
    """
    before = read_state(run_dir)["attempt"]
    command = ["trainer.run", str(run_dir)]
    code = launch(command, config.parallel.nproc_per_node, config.device, held)
    state = read_state(run_dir)
    if code == 2 and state["attempt"] == before:
        for path in written:
            path.unlink()
    elif code:
        if state["state"] == "running":  # killed: no rank could write the state itself
            write_state(run_dir, "failed", state["attempt"])
        print(f"The run failed; logs are in {run_dir}/logs", file=sys.stderr)
    os.close(held)
    return code


def launch(command: Sequence[str], nproc: int, device: str, lock: int | None = None) -> int:
    """Run `python -m COMMAND` on `nproc` ranks; returns the exit code of the first failure, or 0.

    SIGINT or SIGTERM sends a stop request to every rank (save, exit 0); a second one kills the ranks. If this
    process dies, they are asked to stop. They inherit `lock`, if given (`run_folder.lock`): it is held until
    all end.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "OMP_NUM_THREADS": str(max(1, _cpus() // nproc)),
        **(_ON_GPU if sees_gpu(device) else ON_CPU),
        **os.environ,
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(nproc)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks: list[subprocess.Popen] = []
    gently = iter([signal.SIGUSR2])

    def forward(number: int, frame: FrameType | None) -> None:
        ours = next(gently, signal.SIGKILL)
        for rank in ranks:
            rank.send_signal(ours)

    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # ranks inherit this until they have handlers
    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    for rank in range(nproc):
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # Ctrl-C reaches the ranks only through `forward`
            preexec_fn=_end_with_launcher,
            pass_fds=[] if lock is None else [lock],
        )
        ranks.append(process)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    code = _wait(ranks)
    for number, handler in before.items():
        signal.signal(number, handler)
    return code


def exit_with(code: int | None) -> NoReturn:
    """End a command; a rank without the interpreter's shutdown, where process groups may block or abort."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        logging.shutdown()
        os._exit(code or 0)
    sys.exit(code)


def adopt_srun() -> None:
    """In a task of an srun with several tasks, set RANK and what belongs to it, as torchrun does."""
    step = {
        key.removeprefix("SLURM_"): value for key, value in os.environ.items() if key.startswith("SLURM_")
    }
    if "RANK" in os.environ or int(step.get("STEP_NUM_TASKS", 1)) == 1:
        return
    command = ["scontrol", "show", "hostnames", step["STEP_NODELIST"]]
    hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    os.environ |= {
        "RANK": step["PROCID"],
        "LOCAL_RANK": step["LOCALID"],
        "WORLD_SIZE": step["STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": re.split(r"\D", step["STEP_TASKS_PER_NODE"])[0],  # such as 8(x2)
        "MASTER_ADDR": hosts[0],
        "MASTER_PORT": str(10000 + (int(step["JOB_ID"]) * 2 + int(step["STEP_ID"]) * 100) % 20000),
    }


def _cpus() -> int:
    """Number of CPUs this process may run on: a job or taskset may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _wait(ranks: list[subprocess.Popen]) -> int:
    """Wait until all ranks end. If one fails, kill the rest soon after: they would wait in a collective."""
    failed, deadline = 0, float("inf")
    while True:
        codes = [rank.poll() for rank in ranks]
        if not failed and any(codes):
            first, failed = next((rank, code) for rank, code in enumerate(codes) if code)
            deadline = time.monotonic() + _GRACE_SECONDS
            if failed == -signal.SIGKILL:  # a killed rank cannot log this
                why = "by a second stop signal, or by the kernel because memory ran out (see dmesg)"
                print(f"rank {first} was killed: {why}", file=sys.stderr)
        if None not in codes:
            return failed if failed >= 0 else 1
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
        time.sleep(0.05)


def _end_with_launcher() -> None:
    """Runs in the child: on Linux, request a stop signal for the time when the launcher dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
