"""One rank of a frozen run: `python -m trainer.run RUN_DIR`, under srun, torchrun or `python -m trainer`."""

import logging
import os
import socket
import sys
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path
from zlib import crc32

from data_pipeline.config import DataError
from trainer.ranks.launch import StopRequest, exit_with
from trainer.settings.config import ConfigError, RunConfig
from trainer.settings.run_folder import pasted, read_state, write_state
from trainer.settings.secrets import redacted

_OUT_OF_MEMORY = (
    "Continue with less memory per rank: python -m trainer.resume {} with recompute=full, a smaller "
    "micro_batch_size, deepspeed=zero3, or more ranks; python -m trainer.models lists the memory per rank"
)
ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main(arguments: list[str]) -> int:
    """Train as one rank. Returns 0 if finished or stopped, 2 for an error of the user, 1 for any other."""
    if len(arguments) != 1:
        print("usage: python -m trainer.run RUN_DIR (with RANK, WORLD_SIZE and so on set)", file=sys.stderr)
        return 2
    stop = StopRequest()  # before the slow imports, so that a signal during them is noticed
    import torch
    import torch.distributed as dist

    from trainer.ranks.runtime import Ranks, TrainingError, redirect_output

    run_dir = Path(arguments[0])
    try:
        if missing := [key for key in ENVIRONMENT if key not in os.environ]:
            remedy = "start ranks by srun, torchrun or trainer.resume"
            raise ConfigError([f"{', '.join(missing)} not set: {remedy}"])
        config = RunConfig.of_run(run_dir)
        config.check(int(os.environ["WORLD_SIZE"]))
        shared = [read_state(run_dir)["attempt"] + 1]
        # the files in which NCCL records its collectives when one times out
        record = run_dir.absolute() / "logs" / f"attempt-{shared[0]}" / "nccl-rank-"
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(record))
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":  # all ranks have the same error
            print(redacted(str(error)), file=sys.stderr)
        return 2
    try:
        ranks = Ranks.join(config.device)
    except ConfigError as error:
        if os.environ["LOCAL_RANK"] == "0":  # all ranks of this machine have the same error
            print(f"{socket.gethostname()}: {error}", file=sys.stderr)
        return 2
    dist.broadcast_object_list(shared)
    (attempt,) = shared
    if ranks.is_main:
        write_state(run_dir, "running", attempt)
    logs = run_dir / "logs" / f"attempt-{attempt}"
    terminal = redirect_output(logs / f"rank-{ranks.rank}.log")
    try:
        from trainer.train import train

        with ExitStack() as cleanup:
            state = train(config, run_dir, attempt, ranks, stop, terminal, cleanup)
        ranks.leave()
        code = 0
    except (ConfigError, DataError, TrainingError) as error:
        logging.error("%s", error)
        if _first(logs / f"error-{crc32(str(error).encode()):08x}"):  # most errors occur on all ranks
            print(redacted(f"rank {ranks.rank}: {error}"), file=terminal)
        state, code = "failed", 1 if isinstance(error, TrainingError) else 2
    except Exception as error:
        logging.exception("rank %s", ranks.rank)
        said = traceback.format_exc()
        if isinstance(error, torch.OutOfMemoryError):
            said = f"{error}\n{_OUT_OF_MEMORY.format(pasted(run_dir))}"
        print(redacted(f"rank {ranks.rank}: {said}"), file=terminal)
        state, code = "failed", 1
    if ranks.is_main:
        try:
            write_state(run_dir, state, attempt)
        except OSError as error:
            print(f"cannot write the state of the run ({error})", file=terminal)
    return code


def _first(marker: Path) -> bool:
    """Whether this rank is the first to create the file; also true if no rank can create it."""
    with suppress(OSError):
        marker.touch(exist_ok=False)
        return True
    return not marker.exists()


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        code = 1
    exit_with(code)
