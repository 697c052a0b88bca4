"""One rank of a frozen run: `python -m trainer.run RUN_DIR` under srun, torchrun or `trainer.launch`."""

import logging
import os
import sys
import traceback
from pathlib import Path

import torch.distributed as dist

from data_pipeline.config import DataError
from trainer.config import ConfigError, RunConfig
from trainer.run_folder import read_state, write_state
from trainer.runtime import Ranks, StopRequest, TrainingError, redirect_output
from trainer.train import train

USER_ERRORS = (ConfigError, DataError)


def main(run_dir: Path) -> int:
    """Train this rank's part. Returns 0 done or stopped, 2 for the user's error, 1 for anything else."""
    stop = StopRequest()  # before anything slow: a signal during start-up counts
    config = RunConfig.of_run(run_dir)
    ranks = Ranks.join()
    shared = [read_state(run_dir)["attempt"] + 1]
    dist.broadcast_object_list(shared)
    attempt = shared[0]
    if ranks.is_main:
        write_state(run_dir, "running", attempt)
    terminal = redirect_output(run_dir / "logs" / f"attempt-{attempt}" / f"rank-{ranks.rank}.log")
    state = "failed"
    try:
        state = train(config, run_dir, attempt, ranks, stop, terminal)
        ranks.leave()
        return 0
    except (*USER_ERRORS, TrainingError) as error:
        logging.error("%s", error)
        print(f"rank {ranks.rank}: {error}", file=terminal)
        return 2 if isinstance(error, USER_ERRORS) else 1
    except Exception:
        logging.exception("rank %s", ranks.rank)
        print(f"rank {ranks.rank}: {traceback.format_exc()}", file=terminal)
        return 1
    finally:
        if ranks.is_main:
            write_state(run_dir, state, attempt)
        logging.shutdown()


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    if code:
        os._exit(code)  # the process group of a failed rank may block at interpreter exit
