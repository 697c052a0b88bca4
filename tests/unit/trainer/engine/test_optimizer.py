"""The learning rate is a pure function of the step, is continuous, and ends at the configured value."""

from itertools import pairwise

import pytest

from trainer.engine.optimizer import learning_rate
from trainer.settings.config import ScheduleConfig

TOTAL = 100


def rates(kind: str, warmup: int, decay: float, minimum: float) -> list[float]:
    config = ScheduleConfig(kind=kind, warmup_steps=warmup, decay_fraction=decay, min_lr_ratio=minimum)
    return [learning_rate(config, 2.0, step, TOTAL) for step in range(TOTAL)]


def test_warmup_is_linear_and_starts_above_zero():
    assert rates("constant", 4, 0.0, 1.0)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_cosine_falls_from_the_peak_to_the_minimum():
    values = rates("cosine", 10, 1.0, 0.1)
    assert values[9] == 2.0
    assert values[-1] == pytest.approx(0.2)
    assert values[54] == pytest.approx((2.0 + 0.2) / 2)  # halfway through the 90 steps of decay
    assert all(a > b for a, b in pairwise(values[9:]))


def test_wsd_is_flat_and_then_a_line():
    values = rates("wsd", 10, 0.2, 0.0)
    assert set(values[9:80]) == {2.0}
    steps = [a - b for a, b in pairwise(values[79:])]
    assert steps == pytest.approx([2.0 / 20] * 20)
    assert values[-1] == 0.0


def test_a_decay_longer_than_the_run_starts_after_the_warmup():
    assert rates("wsd", 50, 0.9, 0.0)[50] == pytest.approx(2.0 * 49 / 50)
