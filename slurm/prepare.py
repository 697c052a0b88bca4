"""`python -m slurm.prepare RUN_DIR`: one worker of a preparation on a cluster, started by job.sh. Torch-free.

All workers take part in the same steps (data_pipeline/claims.py); none of them leads.
"""

import io
import os
import signal
import socket
import sys
import traceback
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TextIO

from data_pipeline.claims import is_complete
from data_pipeline.config import DataError
from data_pipeline.packing import make_plans
from data_pipeline.prepare import prepare
from moe.config import ConfigError
from slurm.config import Preparation
from trainer.settings.run_folder import read_frozen, read_state, write_state
from trainer.settings.secrets import redacted
from trainer.settings.typed import typed

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


def main(run_dir: Path, rank: int, world_size: int, attempt: int) -> int:
    """Work until the data is prepared, or a stop is asked for. Returns 2 for an error of the user, else 0."""
    for number in _STOP_SIGNALS:
        signal.signal(number, _interrupt)
    logs = run_dir / "logs" / f"attempt-{attempt}"
    logs.mkdir(parents=True, exist_ok=True)
    with open(logs / f"rank-{rank}.log", "a", buffering=1) as log:
        try:
            if read_state(run_dir)["attempt"] < attempt:
                write_state(run_dir, "running", attempt)
            with redirect_stdout(_Both(log, sys.stdout) if rank == 0 else log):
                mistake = _work(run_dir, rank, world_size)
            state = "finished" if mistake is None else "failed"
        except KeyboardInterrupt:
            state, mistake = "stopped", None
        except Exception:
            print(redacted(traceback.format_exc()), file=log)
            raise
        _ignore_stops()
        # a worker that is ended because another one failed says nothing
        if state == "failed" or read_state(run_dir)["state"] == "running":
            write_state(run_dir, state, attempt)
        if mistake is None:
            return 0
        message = redacted(f"worker {rank} on {socket.gethostname()}: {mistake}")
        print(message, file=log)
        with suppress(FileExistsError):  # most mistakes end all workers
            (logs / "error").touch(exist_ok=False)
            print(message, file=sys.stderr, flush=True)
        return 2


def _work(run_dir: Path, rank: int, world_size: int) -> ConfigError | DataError | None:
    """Prepare the data; returns the mistake of the user that makes it impossible."""
    try:
        config = typed(Preparation, read_frozen(run_dir / "config.yaml"))
        folder = Path(config.data.dir)
        if not (folder / "survey" / "claims").is_dir() and not is_complete(folder):
            law = "use a folder on a file system that all nodes and the submitting machine share"
            raise DataError(f"data.dir={folder}: {socket.gethostname()} does not see this preparation; {law}")
        data = replace(config.data, num_workers=1)
        prepare(data, config.vocab_size, config.seed, begin=rank / world_size)
        if rank == 0:  # training makes the plans that are missing
            make_plans(config.data, config.seq_len)
    except (ConfigError, DataError) as error:
        return error
    return None


class _Both(io.TextIOBase):
    """What rank 0 prints is in its log and in that of the job."""

    def __init__(self, *files: TextIO) -> None:
        self._files = files

    def write(self, text: str) -> int:
        for file in self._files:
            file.write(text)
            file.flush()
        return len(text)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _ignore_stops()  # job.sh repeats its signal
    raise KeyboardInterrupt


def _ignore_stops() -> None:
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    os.environ.setdefault("RAYON_NUM_THREADS", os.environ["OMP_NUM_THREADS"])  # of the tokenizer
    given = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "ATTEMPT"))
    sys.exit(main(Path(sys.argv[1]), *given))
