"""The figures of a logged step are over all steps since the last one and over all ranks."""

import time
from typing import Any

import pytest
from harness import run_ranks
from layouts import RATE, ROWS, SEQ_LEN, SmallRun, micro_batches, small_config

from moe.parallelize import dispatched
from trainer.engine.loss import agree_on_totals
from trainer.monitor.metrics import Meter
from trainer.stages.supervised import Supervised
from trainer.train import train_step

PAUSE = 0.2  # seconds that rank r waits for data r + 1 times a step, and for a save once in two steps
SETTINGS = ["deepspeed=zero1", "micro_batch_size=4", "parallel.ep_size=2", "experts.capacity_factor=0.5"]
SETTINGS += [
    "tracker.log_every_steps=2",
    "schedule.warmup_steps=2",
    f"stage.train_tokens={9 * ROWS * SEQ_LEN}",
]


def log_every_second_step() -> list[dict[str, Any]]:
    """The metrics of steps 2 and 4; for each, what this rank dispatched, and the seconds since the last."""
    run, found = SmallRun(*SETTINGS), []
    started, before = time.perf_counter(), dispatched(run.engine.module)
    meter = Meter(run.config, run.ranks, run.engine, run.engine._engine.basic_optimizer, 0)
    for step in range(4):
        with run.engine.clock.wait("data"):
            time.sleep(PAUSE * (run.ranks.rank + 1))
        meter.begin(step + 1)
        assert meter.due == (step % 2 == 1)
        batches = micro_batches(run.plan, run.ranks.rank, step)
        totals = agree_on_totals(batches, False)
        meter.add(totals)
        sums, _, norm = train_step(run.engine, run.balance, Supervised.loss_shares, batches, totals, RATE)
        if not meter.due:
            with run.engine.clock.wait("save"):
                time.sleep(PAUSE)
            continue
        next_start = time.perf_counter()
        metrics = meter.measure(step + 1, sums, totals, norm, RATE, 0.25)
        now, after = time.perf_counter(), dispatched(run.engine.module)
        seen = {"traffic": [new - old for new, old in zip(after, before, strict=True)]}
        seen |= {"elapsed": now - started, "tokens": totals.tokens}
        found.append({"metrics": metrics, **seen})
        started, before = next_start, after  # the meter's own time begins and ends inside
    meter.begin(9)
    assert meter.due, "the last step is always logged"
    run.engine.close()
    return found


@pytest.fixture(scope="module")
def logged() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """For each logged step, what the two ranks have found."""
    return list(zip(*run_ranks(log_every_second_step, 2), strict=True))


def test_times_are_of_one_step_and_of_the_slowest_rank(logged) -> None:
    for ranks in logged:
        metrics = ranks[0]["metrics"]
        assert 2 * PAUSE <= metrics["data_wait_seconds"] < 4 * PAUSE, "rank 1 waits longest"
        assert metrics["data_wait_seconds"] < metrics["step_seconds"]
        assert metrics["step_seconds"] <= (ranks[0]["elapsed"] - PAUSE) / 2
        assert metrics["step_seconds"] >= (ranks[0]["elapsed"] - PAUSE) / 2 - PAUSE
        assert metrics["stall_fraction"] == pytest.approx(
            metrics["data_wait_seconds"] / metrics["step_seconds"]
        )
        assert metrics["save_stall_seconds"] == 0.25


def test_rates_follow_from_the_time_of_a_step(logged) -> None:
    config = small_config(*SETTINGS)
    total_steps, step_tokens = config.stage.total_steps, ROWS * SEQ_LEN
    for ranks in logged:
        metrics = ranks[0]["metrics"]
        flops = config.model.flops_per_token(SEQ_LEN) * step_tokens / metrics["step_seconds"] / 2  # of a rank
        assert metrics["tflops"] == pytest.approx(flops / 1e12)
        assert metrics["tokens_per_second"] == pytest.approx(step_tokens / metrics["step_seconds"])
        per_step = step_tokens / metrics["tokens_per_second_mean"]
        assert metrics["eta_seconds"] == pytest.approx(per_step * (total_steps - metrics["step"]))
        assert metrics["tokens"] == metrics["step"] * step_tokens
        assert 0 < metrics["padding"] == pytest.approx(1 - ranks[0]["tokens"] / step_tokens)


def test_what_was_dispatched_is_that_of_all_ranks_since_the_last_logged_step(logged) -> None:
    for ranks in logged:
        metrics = ranks[0]["metrics"]
        sent, routed, received = zip(*(rank["traffic"] for rank in ranks), strict=True)
        assert metrics["dispatch_gib"] == pytest.approx(sum(sent) / 2 / 2 / 2**30)  # ranks, steps
        assert metrics["received_slots"] == [count / 2 for count in received]
        assert metrics["received_imbalance"] == pytest.approx(max(received) / (sum(received) / 2) - 1)
        assert 0 < metrics["drop_fraction"] == pytest.approx(1 - sum(received) / sum(routed))
