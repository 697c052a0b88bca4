"""The training loop itself: when it evaluates and saves, which rows and rates it takes, and what it times."""

import io
import json
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import prepare_corpus
from harness import run_ranks
from layouts import ROWS, SEQ_LEN, small_config

from trainer.checkpoints.saving import Checkpoints
from trainer.engine.optimizer import learning_rate
from trainer.ranks.runtime import Ranks
from trainer.stages.supervised import Supervised
from trainer.train import train

STEPS, STOPPED_AT, SLOW = 8, 5, 2.5
SETTINGS = [
    *("model.vocab_size=512", "micro_batch_size=8", "deepspeed=zero1", "tracker.log_every_steps=1"),
    *("schedule.warmup_steps=3", f"stage.train_tokens={STEPS * ROWS * SEQ_LEN}", "tracker.wandb=disabled"),
    *("checkpoint.every_steps=3", "evaluate.every_steps=3", "evaluate.rows=4", "checkpoint.keep=9"),
]


def train_with_notes(overrides: list[str], run_dir: str) -> list[dict[str, Any]]:
    """Train, stopped after STOPPED_AT steps, and go on; evaluations and saves take SLOW seconds longer.

    Returns for each of the two attempts its outcome, the rows of each step, and what was saved and evaluated.
    """
    stop = SimpleNamespace(requested=False)
    noted: dict[str, Any] = {}
    take, evaluate, save = Supervised.micro_batches, Supervised.evaluate, Checkpoints.save

    def micro_batches(stage: Any) -> Any:
        batches = take(stage)
        noted["rows"].append([row for batch in batches for row in batch.rows])
        stop.requested = noted["attempt"] == 1 and len(noted["rows"]) > STOPPED_AT
        return batches

    def slow_evaluation(stage: Any) -> Any:
        noted["evaluated"].append(len(noted["rows"]))
        time.sleep(SLOW)
        return evaluate(stage)

    def slow_save(checkpoints: Any, engine: Any, balance: Any, step: int, of_stage: dict) -> None:
        noted["saved"].append(step)
        time.sleep(SLOW)
        save(checkpoints, engine, balance, step, of_stage)

    Supervised.micro_batches, Supervised.evaluate, Checkpoints.save = (
        micro_batches,
        slow_evaluation,
        slow_save,
    )
    config, found = small_config(*overrides), []
    ranks = Ranks(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    for attempt in (1, 2):
        noted.update(attempt=attempt, rows=[], evaluated=[], saved=[])
        stop.requested = False
        with ExitStack() as cleanup:
            outcome = train(config, Path(run_dir), attempt, ranks, stop, io.StringIO(), cleanup)
        found.append({**noted, "outcome": outcome})
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
    """What each rank has noted, and the lines of metrics.jsonl."""
    folder = tmp_path_factory.mktemp("loop")
    overrides = [*prepare_corpus(folder), *SETTINGS]
    run_dir = folder / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    noted = run_ranks(train_with_notes, 2, overrides, str(run_dir), timeout=250)
    return noted, [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_stop_saves_and_the_next_attempt_takes_the_next_rows(run) -> None:
    noted, _ = run
    assert [attempt["outcome"] for attempt in noted[0]] == ["stopped", "finished"]
    for step in range(STEPS):
        first = step < STOPPED_AT  # attempt 1 has taken the rows of one more step when it stops
        of_ranks = [rank[0]["rows"][step] if first else rank[1]["rows"][step - STOPPED_AT] for rank in noted]
        rows = range(step * ROWS, (step + 1) * ROWS)
        assert sorted(of_ranks[0] + of_ranks[1]) == list(rows)
    assert [attempt["saved"] for attempt in noted[0]] == [[3, STOPPED_AT], [6, STEPS]]


def test_evaluations_are_regular_and_the_last_step_has_one(run) -> None:
    noted, lines = run
    assert noted[0][0]["evaluated"] == [3]
    assert noted[0][1]["evaluated"] == [6 - STOPPED_AT, STEPS - STOPPED_AT]
    assert [line["step"] for line in lines if "loss/text" in line] == [3, 6, STEPS]


def test_steps_are_timed_without_evaluations_and_saves(run) -> None:
    """Both lie between the steps 3 and 4, and between 6 and 7."""
    _, lines = run
    steps = {line["step"]: line for line in lines if "loss" in line}
    assert sorted(steps) == list(range(1, STEPS + 1))
    for step in (4, 7):
        assert steps[step]["step_seconds"] < SLOW
        assert steps[step]["tokens_per_second"] == pytest.approx(ROWS * SEQ_LEN / steps[step]["step_seconds"])


def test_the_rate_is_that_of_the_step(run) -> None:
    _, lines = run
    config = small_config(*SETTINGS)
    for line in lines:
        if "loss" in line:
            rate = learning_rate(config.schedule, config.optimizer.lr, line["step"] - 1, STEPS)
            assert line["learning_rate"] == rate
