"""Batches of texts, and how work is told."""

import pytest

from trainer.stages import orders
from trainer.stages.orders import Progress, Room, Text, packed


def test_batches_hold_what_fits_the_longest_first():
    texts = [Text((0,) * length, []) for length in (3, 9, 1, 5, 5, 20, 2)]
    found = [[len(text.ids) for text in batch] for batch in packed(texts, Room(rows=3, tokens=10))]
    assert found == [[20], [9], [5, 5], [3, 2, 1]]
    assert [len(batch) for batch in packed(texts, Room(rows=2, tokens=100))] == [2, 2, 2, 1]
    assert list(packed([], Room(3, 10))) == []


def test_progress_is_told_after_two_seconds_and_then_rarely(monkeypatch):
    now, said = 0.0, []
    monkeypatch.setattr(orders.time, "monotonic", lambda: now)
    progress = Progress("texts", 10000, said.append)
    for second in range(1, 1000):
        now = float(second)
        progress.tell(second * 10)
    assert said[0] == "20 of 10,000 texts, 998 s left"
    assert said[1] == "70 of 10,000 texts, 993 s left"
    assert 20 < len(said) < 60
    progress.tell(10000)
    assert "10,000 of" not in said[-1]


@pytest.mark.parametrize("seconds", [1.9, 0.0])
def test_short_work_is_not_told(monkeypatch, seconds):
    now, said = 0.0, []
    monkeypatch.setattr(orders.time, "monotonic", lambda: now)
    progress = Progress("texts", 2, said.append)
    now = seconds
    progress.tell(1)
    assert said == []
