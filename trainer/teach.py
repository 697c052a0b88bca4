"""Write down what a teacher says of every row of a run, before the run. It takes the keys of the run.

  python -m trainer.teach experiment=demo_distill distill.lessons=data/lessons

Then `python -m trainer` with these keys trains without the teacher's model. Files that are written stay: a
command that was stopped goes on where it was, with any number of ranks. It starts the ranks of
parallel.nproc_per_node here; under srun or torchrun it is one of them.
"""

import logging
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from moe.config import ConfigError
from trainer.ranks.launch import adopt_srun, launch
from trainer.settings.command import check, compose_and
from trainer.settings.config import RunConfig
from trainer.settings.run_folder import pasted

_SECONDS_BETWEEN_LINES = 5.0


def teach_rank(config: RunConfig) -> None:
    """One rank's part: the files whose number, modulo the number of ranks, is its own."""
    logging.getLogger().setLevel(logging.WARNING)  # Hydra's logging would show what DeepSpeed compiles
    from data_pipeline.mixture import skip_rows
    from trainer.checkpoints.assemble import build_model
    from trainer.engine.cpu_products import fast_products
    from trainer.engine.engine import init_deepspeed
    from trainer.ranks.runtime import DTYPES, Ranks
    from trainer.stages.held_out import open_loader
    from trainer.stages.lessons import Lessons, Teacher, begin_folder

    ranks = Ranks.of_command(config.device)
    ranks.from_main(lambda: begin_folder(config))
    folder, size = Lessons(config), config.micro_batch_size
    last = config.stage.total_steps * config.stage.global_batch_size - 1
    rows = skip_rows(last, config.data.skip) + 1  # as data.skip counts them
    files = ranks.from_main(lambda: folder.absent(rows))
    mine = files[ranks.rank :: ranks.world_size]
    rounds, started, said = -(-len(files) // ranks.world_size), time.monotonic(), time.monotonic()
    print(f"{rows:,} rows, {folder.row_bytes / 2**20:.1f} MiB each, {len(files):,} files to write")
    init_deepspeed(ranks.device)
    plan = config.plan(ranks.world_size)
    teacher = Teacher(config, ranks, partial(build_model, plan=plan, ranks=ranks))
    whole = replace(config, data=replace(config.data, skip=[]))
    with (
        open_loader(whole, ranks, rank=0, world_size=1, global_batch_size=size) as loader,
        fast_products(ranks.device, DTYPES[config.dtype]),
    ):
        for number in range(rounds):  # all ranks meet in all of each: what nobody needs is dropped
            first = mine[number] if number < len(mine) else files[-1]
            told = []
            for row in range(first, first + folder.rows_per_file, size):
                told.append((batch := loader.batch(row), *teacher(batch)))
                now = time.monotonic()
                if ranks.is_main and now - said > _SECONDS_BETWEEN_LINES:
                    done = (number + (row + size - first) / folder.rows_per_file) / rounds
                    left = (now - started) * (1 / done - 1)
                    print(f"{done:.0%} of {rows:,} rows, {left:.0f} s left", flush=True)
                    said = now
            if number < len(mine):
                folder.write(first, rows, told)
    ranks.any(False)  # all files are written
    assert config.distill is not None
    where = pasted(Path(str(config.distill.lessons)))
    if ranks.is_main:
        print(f"{where} holds the lessons of {rows:,} rows; {len(files):,} files are new")
        print(f"Next: python -m trainer with the same keys (distill.lessons={where})")
    ranks.leave()


def teach(cfg: DictConfig) -> int:
    """Check the configuration, with its teacher, and start the ranks, or be one."""
    config = RunConfig.load(cfg)
    if config.distill is None or config.distill.lessons is None:
        why = (
            "distill=null: there is no teacher"
            if config.distill is None
            else "distill.lessons=null: there is no folder"
        )
        raise ConfigError(f"{why}; give distill=teacher, distill.teacher=FOLDER and distill.lessons=FOLDER")
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ConfigError("-m: lessons are not written for a sweep; give the keys of one run")
    if config.data.mode != "prepared":
        raise ConfigError("data.mode=streaming has no rows to write lessons for; use data.mode=prepared")
    lessons, cfg.distill.lessons = str(Path(config.distill.lessons).resolve()), None
    check(RunConfig.load(cfg), cfg)
    cfg.distill.lessons = lessons
    adopt_srun()
    if "RANK" not in os.environ:
        return launch(["trainer.teach", *sys.argv[1:]], config.parallel.nproc_per_node, config.device)
    teach_rank(RunConfig.load(cfg))
    return 0


if __name__ == "__main__":
    compose_and("train", __doc__, teach)
