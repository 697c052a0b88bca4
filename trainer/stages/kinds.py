"""Which kind of stage a run is."""

from typing import Any

from moe.balance import Balance
from trainer.engine.engine import Engine
from trainer.ranks.runtime import Ranks
from trainer.settings.config import RunConfig
from trainer.stages.reinforced import Reinforced
from trainer.stages.stage import BuildModel, Stage
from trainer.stages.supervised import Supervised


def open_stage(
    config: RunConfig,
    ranks: Ranks,
    engine: Engine,
    balance: Balance,
    step: int,
    state: dict[str, Any],
    build_model: BuildModel,
) -> Stage:
    """The stage of a run, about to train the step after `step`, with the `state` that it saved there."""
    if config.rl is not None:
        return Reinforced(config, ranks, engine, balance, step, state, build_model)
    return Supervised(config, ranks, engine, balance, step)
