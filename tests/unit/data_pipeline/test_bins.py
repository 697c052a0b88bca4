"""Best-fit-decreasing on a histogram equals the textbook algorithm, which places one item at a time."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.best_fit import pack_lengths


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The sorted fill levels of the bins, by the textbook algorithm."""
    filled: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, held in enumerate(filled) if held + length <= capacity]
        if fits:
            filled[max(fits, key=lambda i: filled[i])] += length
        else:
            filled.append(length)
    return sorted(filled)


@given(capacity=st.integers(1, 40), data=st.data())
def test_equals_the_textbook_and_places_every_item_once(capacity: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=120))
    counts = np.bincount(lengths, minlength=capacity + 1)[: capacity + 1]
    bins = pack_lengths(counts, capacity)
    contents = [bins.contents(number) for number in range(bins.total)]
    assert sorted(sum(length for length, _ in items) for items in contents) == best_fit_decreasing(
        lengths, capacity
    )
    placed = sorted(item for items in contents for item in items)
    assert placed == [(length, i) for length in range(capacity + 1) for i in range(counts[length])]


@pytest.mark.slow  # it measures time: it fails on a busy machine
def test_a_hundred_million_lengths_take_less_than_a_second() -> None:
    """CPU time of histogram and packing for rows of 32768 tokens, with the lengths of 100 shards."""
    chance = np.random.default_rng(0)
    shard = np.clip(chance.lognormal(9.0, 1.2, 1_000_000), 1, 32769).astype(np.uint32)
    seconds = []
    for _ in range(3):  # the best of three: other processes slow this one down
        started = time.process_time()
        counts = np.zeros(32770, dtype=np.int64)
        for _ in range(100):
            counts += np.bincount(shard, minlength=32770)
        bins = pack_lengths(counts, 32769)
        seconds.append(time.process_time() - started)
    assert counts.sum() == 10**8
    assert 1 - (counts @ np.arange(32770)) / (bins.total * 32769) < 0.001, "hardly any space stays empty"
    assert min(seconds) < 1.0
