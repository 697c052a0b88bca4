"""`python -m trainer experiment=NAME [key=value ...]`: compose, validate, freeze, start the ranks here."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from data_pipeline.shards import open_prepared
from data_pipeline.streaming import TextStream, absolute_paths
from data_pipeline.tokenizer import check_vocab_size, tokenizer_of
from trainer.ranks.launch import launch
from trainer.settings.command import tells_mistakes
from trainer.settings.config import RunConfig
from trainer.settings.parallel import ParallelPlan
from trainer.settings.run_folder import forget_origin, freeze, lock, read_state, write_state


def compose_and(
    config_name: str, act: Callable[[DictConfig], int], finish: Callable[[], int] = lambda: 0
) -> NoReturn:
    """Compose `conf/<config_name>.yaml` with the command line and hand it to `act`; exits with its code.

    Under -m every point of the sweep goes to `act`; `finish` follows the last one, unless one failed. A wrong
    configuration exits with 2 and one message, whether Hydra finds it (an unknown group) or we.
    """
    composed, headline = False, "The configuration is wrong:\n"

    @hydra.main(version_base="1.3", config_path="pkg://conf", config_name=config_name)
    def entry(cfg: DictConfig) -> None:
        nonlocal composed
        composed = True
        if code := tells_mistakes(act, headline)(cfg):
            sys.exit(code)

    try:
        entry()
    except SystemExit as done:
        sys.exit(2 if done.code and not composed else done.code)
    except KeyboardInterrupt:
        print("interrupted before the run was started", file=sys.stderr)
        sys.exit(1)
    sys.exit(tells_mistakes(finish, headline)() if composed else 0)  # not composed: --help, --cfg


def train_here(cfg: DictConfig) -> int:
    """Validate, freeze the run folder and train on this machine's ranks."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:  # a sweep is a folder of numbered runs
        cfg.name = f"{cfg.name}/{hydra_config.job.num}"
    config = RunConfig.load(cfg)
    check(config, cfg, ParallelPlan.of(config, config.parallel.nproc_per_node))
    held = lock(config.run_dir)
    frozen = [] if (path := config.run_dir / "config.yaml").exists() else [path]
    freeze(config.run_dir, cfg, list(hydra_config.overrides.task))
    code = start(config.run_dir, RunConfig.of_run(config.run_dir), held, frozen)
    if read_state(config.run_dir)["state"] == "stopped":
        sys.exit(code)  # a stop is also for the points of a sweep that are left
    return code


def check(config: RunConfig, cfg: DictConfig, plan: ParallelPlan) -> None:
    """Raises ConfigError or DataError if the run or its data is wrong.

    Makes what the run reads independent of the folder it is started in, in `cfg`, of which `config` is.
    """
    forget_origin(config, config.run_dir)
    config.check(plan)
    check_data(config)
    for group, key in (("data", "dir"), ("stage", "init_from")):
        if cfg[group][key] is not None:
            cfg[group][key] = str(Path(cfg[group][key]).resolve())
    if config.data.mode == "streaming":
        cfg.data.merge_with(absolute_paths(config.data))


def check_data(config: RunConfig) -> None:
    """Raises DataError if the data is not prepared for this run, is damaged, or does not fit the model."""
    if config.data.mode == "streaming":
        vocab_size = (tokenizer := tokenizer_of(config.data)).vocab_size
        for name in sorted(config.data.trained_sources()):
            TextStream(config.data, name, tokenizer, config.seed)
    else:
        folder = Path(config.data.dir)
        manifest = open_prepared(folder)
        manifest.check_settings(config.data.content_settings(), folder)
        vocab_size = manifest.tokenizer.vocab_size
    check_vocab_size(vocab_size, config.model.vocab_size)


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
