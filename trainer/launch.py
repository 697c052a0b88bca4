"""Start the ranks of a run on this machine and see them through."""

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

from trainer.run_folder import read_state, write_state
from trainer.stop import STOP_SIGNALS

_GRACE_SECONDS = 10.0  # for the other ranks, once one has failed


def launch(run_dir: Path, nproc: int, lock: int, command: Sequence[str] = ("trainer.run",)) -> int:
    """Run `python -m COMMAND RUN_DIR` on `nproc` ranks; returns the exit code of the first failure, or 0.

    SIGINT and SIGTERM become a stop request to every rank (save, exit 0); a second one kills. If this process
    dies, the ranks are asked to stop. `lock` (`run_folder.lock`) is held until the last rank is gone.
    """
    environment = {
        **os.environ,
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    # Large blocks are kept instead of returned: page faults cost a fifth of the time of a step on a CPU.
    environment.setdefault("MALLOC_MMAP_THRESHOLD_", str(8 << 30))
    environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(16 << 30))
    ranks: list[subprocess.Popen] = []
    _forward_stop_signals(ranks)
    for rank in range(nproc):
        process = subprocess.Popen(
            [sys.executable, "-m", *command, str(run_dir)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # Ctrl-C reaches the ranks through us, once
            preexec_fn=_prepare_rank,
            pass_fds=[lock],
        )
        ranks.append(process)
    code = _wait(ranks)
    state = read_state(run_dir)
    if code and state["state"] == "running":  # killed: no rank could say so itself
        write_state(run_dir, "failed", state["attempt"])
    os.close(lock)
    return code


def _wait(ranks: list[subprocess.Popen]) -> int:
    """Until all have ended; a failed rank ends the others, which would wait for it in a collective."""
    deadline = None
    failed = 0
    while None in [rank.poll() for rank in ranks]:  # all are asked, each time
        failed = failed or next((rank.returncode for rank in ranks if rank.returncode), 0)
        if failed and deadline is None:
            deadline = time.monotonic() + _GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
        time.sleep(0.05)
    failed = failed or next((rank.returncode for rank in ranks if rank.returncode), 0)
    return failed if failed >= 0 else 1


def _forward_stop_signals(ranks: list[subprocess.Popen]) -> None:
    seen = 0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen += 1
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGUSR2 if seen == 1 else signal.SIGKILL)

    signal.signal(signal.SIGINT, forward)
    signal.signal(signal.SIGTERM, forward)


def _prepare_rank() -> None:
    """In the child: hold stop signals until it listens; on Linux, have one sent when the launcher dies."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
