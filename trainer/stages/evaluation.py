"""What training measures between its steps: held-out data, and benchmarks."""

from collections.abc import Callable
from pathlib import Path

from data_pipeline.tokenizer import END_OF_TEXT, tokenizer_of
from moe.balance import Balance
from trainer.engine.engine import Engine
from trainer.ranks.runtime import Ranks
from trainer.settings.benchmarks import scores_file, write_scores
from trainer.settings.config import RunConfig
from trainer.stages.asked import Reader
from trainer.stages.benchmarks import Benchmarks
from trainer.stages.orders import Room
from trainer.stages.stage import Stage


def open_benchmarks(config: RunConfig, ranks: Ranks, say: Callable[[str], object]) -> Benchmarks | None:
    """The benchmarks of a run, loaded with their data; None if it has none. `say` prints their progress."""
    wanted = config.evaluate.benchmarks
    if wanted is None or not wanted.wanted:
        return None
    room = Room(wanted.rows_at_once, config.micro_batch_size * config.stage.seq_len)
    tokenizer = tokenizer_of(config.data)
    reader = Reader(tokenizer, END_OF_TEXT, END_OF_TEXT, config.model.max_position_embeddings)
    return Benchmarks(wanted, reader, ranks, room, say)


def evaluate(
    run_dir: Path,
    stage: Stage,
    benchmarks: Benchmarks | None,
    engine: Engine,
    balance: Balance,
    step: int,
    is_last: bool,
) -> dict[str, float]:
    """The metrics on held-out data and of benchmarks that are due after `step`; every rank must call it."""
    found: dict[str, float] = {}
    every = engine.config.evaluate.every_steps
    if every and (step % every == 0 or is_last):
        found |= stage.evaluate()
    if benchmarks is not None and (step % benchmarks.every_steps == 0 or is_last):
        engine.module.eval()
        scores = benchmarks.run(engine.apply, balance.bias, step)
        engine.module.train()
        if benchmarks.writes:
            write_scores(scores_file(run_dir, step), scores, f"step-{step:08d}")
        found |= {score.key: score.value for score in scores}
    return found
