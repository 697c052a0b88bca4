"""Batches of texts, and how work is told."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.model import ModelOutput
from trainer.ranks.runtime import Ranks
from trainer.stages import orders
from trainer.stages.orders import Orders, Progress, Room, Text, packed


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


class Stand:
    """A model that finds a label as probable as its place and its size say, and best if both are even."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], dict[str, Any]]] = []

    def __call__(self, ids: Tensor, positions: Tensor, borders: Tensor, **options: Any) -> ModelOutput:
        self.calls.append((ids[0].tolist(), options))
        lengths = options["lengths"]
        assert borders.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
        assert positions.tolist() == [[n for length in lengths for n in range(length)]]
        places, labels = options["how"], options["labels"]
        before = ids[0][places]  # the token after which a label is scored
        values = -(1000.0 * before + labels)
        return ModelOutput(None, None, None, log_probs=values, best=(before + labels) % 2 == 0)


def test_texts_that_are_read_alike_are_read_once_and_each_label_after_its_token():
    model, bias = Stand(), torch.zeros(1)
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    asked: Any = (model, bias, None, ranks, Room(2, 100), print)
    pairs = [([1, 2, 3], [4]), ([1, 2, 3], [5]), ([1], [2, 3, 4]), ([9], []), ([7, 8], [6, 8]), ([1], [3, 4])]
    found = Orders(*asked).score(pairs)
    assert found == [
        (-3004.0, False),
        (-3005.0, True),
        (-(1002.0 + 2003.0 + 3004.0), False),
        (0.0, True),
        (-(8006.0 + 6008.0), True),
        (-(1003.0 + 3004.0), False),  # only its first token is the best
    ]
    assert [ids for ids, _ in model.calls] == [[1, 2, 3, 7, 8, 6], [1, 3]]
    assert all(options["selection_bias"] is bias for _, options in model.calls)


def test_what_goes_wrong_in_an_order_is_known():
    def broken(*_: Any, **__: Any) -> ModelOutput:
        raise RuntimeError("no memory")

    asked: Any = (broken, None, None, Ranks(0, 0, 1, torch.device("cpu")), Room(2, 100), print)
    ours = Orders(*asked)
    with pytest.raises(RuntimeError, match="no memory"):
        ours.run(lambda: ours.score([([1], [2])]))
    assert ours.failed
