"""Which kind of stage a run is, and what it measures beside it."""

from collections.abc import Callable
from typing import Any

from data_pipeline.tokenizer import END_OF_TEXT, tokenizer_of
from moe.balance import Balance
from trainer.engine.engine import Engine
from trainer.ranks.runtime import Ranks
from trainer.settings.config import RunConfig
from trainer.stages.asked import Reader
from trainer.stages.benchmarks import Benchmarks
from trainer.stages.orders import Room
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


def open_benchmarks(config: RunConfig, ranks: Ranks, say: Callable[[str], object]) -> Benchmarks | None:
    """The benchmarks of a run, loaded with their data; None if it has none. `say` prints their progress."""
    wanted = config.evaluate.benchmarks
    if wanted is None or not wanted.wanted:
        return None
    room = Room(wanted.rows_at_once, config.micro_batch_size * config.stage.seq_len)
    tokenizer = tokenizer_of(config.data)
    reader = Reader(tokenizer, END_OF_TEXT, END_OF_TEXT, config.model.max_position_embeddings)
    return Benchmarks(wanted, reader, ranks, room, say)
