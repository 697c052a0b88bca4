"""Start the ranks of a run on this machine and see them through; how a rank is asked to stop. Torch-free."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from trainer.settings.config import RunConfig
from trainer.settings.run_folder import read_state, write_state

_DEVICES = Path("/dev")
NO_GPUS = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that hide all; the last is SLURM's
_GRACE_SECONDS = 10.0  # for the other ranks, once one has failed
# Large blocks are kept instead of returned: page faults cost a fifth of the time of a step on a CPU. Beside a
# GPU these blocks are the copy of a checkpoint, which every rank would keep.
_ON_CPU = {"MALLOC_MMAP_THRESHOLD_": str(8 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
# Rows per expert differ in every step: segments that can grow do not fall to pieces.
_ON_GPU = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)  # NCCL takes SIGUSR1


class StopRequest:
    """Set by a stop signal; the loop asks all ranks to agree on it."""

    def __init__(self) -> None:
        self.requested = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the launcher holds them back until now

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def sees_gpu(device: str) -> bool:
    """Whether a run on `device` (auto, cuda or cpu) finds an NVIDIA GPU here; torch may still refuse it."""
    hidden = device == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") in NO_GPUS
    return not hidden and any(_DEVICES.glob("nvidia[0-9]*"))


def start(run_dir: Path, config: RunConfig, held: int, written: list[Path]) -> int:
    """Start the ranks of a frozen run whose lock is held, and say where to look if they fail.

    `written` are the files that settle what the ranks were asked for. Where they refuse before the attempt
    begins (this machine has fewer GPUs, say), these are removed: another try may ask for something else.
    """
    before = read_state(run_dir)["attempt"]
    code = launch(run_dir, config.parallel.nproc_per_node, config.device, held)
    state = read_state(run_dir)
    if code == 2 and state["attempt"] == before:
        for path in written:
            path.unlink()
    elif code:
        if state["state"] == "running":  # killed: no rank could say so itself
            write_state(run_dir, "failed", state["attempt"])
        print(f"The run failed; logs are in {run_dir}/logs", file=sys.stderr)
    os.close(held)
    return code


def launch(
    run_dir: Path, nproc: int, device: str, lock: int, command: Sequence[str] = ("trainer.run",)
) -> int:
    """Run `python -m COMMAND RUN_DIR` on `nproc` ranks; returns the exit code of the first failure, or 0.

    SIGINT and SIGTERM become a stop request to every rank (save, exit 0); a second one kills. If this process
    dies, the ranks are asked to stop. They inherit `lock` (`run_folder.lock`): it is held until all are gone.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "OMP_NUM_THREADS": str(max(1, _cpus() // nproc)),
        **(_ON_GPU if sees_gpu(device) else _ON_CPU),
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

    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # ranks start so, until they listen
    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    for rank in range(nproc):
        process = subprocess.Popen(
            [sys.executable, "-m", *command, str(run_dir)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # Ctrl-C reaches the ranks through us, once
            preexec_fn=_end_with_launcher,
            pass_fds=[lock],
        )
        ranks.append(process)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    code = _wait(ranks)
    for number, handler in before.items():
        signal.signal(number, handler)
    return code


def _cpus() -> int:
    """Those that this process may run on: a job or taskset may leave fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _wait(ranks: list[subprocess.Popen]) -> int:
    """Until all have ended; a failed rank ends the others, which would wait for it in a collective."""
    failed, deadline = 0, float("inf")
    while True:
        codes = [rank.poll() for rank in ranks]
        if not failed and any(codes):
            first, failed = next((rank, code) for rank, code in enumerate(codes) if code)
            deadline = time.monotonic() + _GRACE_SECONDS
            if failed == -signal.SIGKILL:  # no log says so
                why = "by a second stop signal, or by the kernel because memory ran out (dmesg tells)"
                print(f"rank {first} was killed: {why}", file=sys.stderr)
        if None not in codes:
            return failed if failed >= 0 else 1
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
        time.sleep(0.05)


def _end_with_launcher() -> None:
    """In the child: on Linux, have a stop signal sent when the launcher dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
