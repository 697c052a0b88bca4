"""Train a model on this machine: compose and check the configuration, freeze the run folder, start the ranks.

  python -m trainer experiment=demo                                    a whole run of conf/experiment
  python -m trainer experiment=demo name=a optimizer.lr=1e-3           the same with other values of any keys
  python -m trainer -m experiment=demo name=b optimizer.lr=1e-3,2e-3   a sweep: one run folder for each point

Prepare the data first: python -m data_pipeline experiment=demo. A run that was stopped goes on with
python -m trainer.resume RUN_DIR. --cfg job prints the composed configuration. docs/configuration.md explains
the keys, docs/data.md those of data, docs/models.md those of model.
"""

import sys

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from trainer.ranks.launch import start
from trainer.settings.command import check, compose_and
from trainer.settings.config import RunConfig
from trainer.settings.run_folder import freeze, lock, read_state


def train_here(cfg: DictConfig) -> int:
    """Check the configuration, freeze the run folder and train on the ranks of this machine."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:  # a sweep is a folder of numbered runs
        cfg.name = f"{cfg.name}/{hydra_config.job.num}"
    config = RunConfig.load(cfg)
    check(config, cfg)
    held = lock(config.run_dir)
    frozen = [] if (path := config.run_dir / "config.yaml").exists() else [path]
    freeze(config.run_dir, cfg, list(hydra_config.overrides.task))
    code = start(config.run_dir, RunConfig.of_run(config.run_dir), held, frozen)
    if read_state(config.run_dir)["state"] == "stopped":
        sys.exit(code)  # a stop request also ends the remaining points of a sweep
    return code


if __name__ == "__main__":
    compose_and("train", __doc__, train_here)
