"""Rows of whole documents: every target once, whole conversations, length shares, plans that are kept."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import best_fit
from data_pipeline.config import DataError
from data_pipeline.manifest import replace_synced
from data_pipeline.packing import BestFitRows, PackedSource

END = 0


class Stream:
    """The part of TokenStream that best-fit packing needs, in memory: two shards; token t has id t + 1."""

    def __init__(self, lengths: list[int], first: int = 0, has_loss: bool = False) -> None:
        self._ends = np.cumsum([0, *lengths])
        self._half = len(lengths) // 2
        self.has_loss = has_loss
        self._tokens = np.arange(first + 1, first + 1 + self._ends[-1], dtype=np.uint32)
        self._tokens[self._ends[1:] - 1] = END

    def __len__(self) -> int:
        return len(self._tokens)

    def document_offsets(self):
        yield self._ends[: self._half + 1].astype(np.int64)
        yield self._ends[self._half :].astype(np.int64)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._tokens[start:stop]

    def read_loss(self, start: int, stop: int) -> np.ndarray:
        return self._tokens[start:stop] % 3 > 0

    @property
    def targets(self) -> Counter:
        """Counts of (token, next token) within each document."""
        spans = zip(self._ends[:-1], self._ends[1:], strict=True)
        documents = [self._tokens[start:stop].tolist() for start, stop in spans]
        return Counter(pair for document in documents for pair in pairwise(document))


def open_rows(folder: Path, streams: dict[str, Stream], seq_len: int, shares: dict | None = None, **weights):
    sources = {name: PackedSource(s, weights.get(name, 1.0), None) for name, s in streams.items()}
    return BestFitRows(folder, "p", sources, seq_len, shares or {})


def test_processes_of_one_number_on_two_nodes_make_the_same_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams, undisturbed = {"a": Stream([5, 9, 3, 30])}, tmp_path / "undisturbed"
    undisturbed.mkdir()
    expected = targets_of(open_rows(undisturbed, streams, 16))

    def while_another_does_it(partial: Path, path: Path) -> None:
        monkeypatch.setattr(best_fit, "replace_synced", replace_synced)
        open_rows(tmp_path, streams, 16)
        replace_synced(partial, path)

    monkeypatch.setattr(best_fit, "replace_synced", while_another_does_it)
    assert targets_of(open_rows(tmp_path, streams, 16)) == expected
    assert sorted(path.name for path in (tmp_path / "packing").iterdir()) == ["p-16.items", "p-16.npz"]


def test_a_plan_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "packing").touch()  # in place of a read-only folder: root can write to those
    with pytest.raises(DataError, match=r"p-16\.npz is missing and cannot be written \(.*; run python -m"):
        open_rows(tmp_path, {"a": Stream([5, 9])}, 16)


def targets_of(rows: BestFitRows) -> Counter:
    found: Counter = Counter()
    for number in range(len(rows)):
        row = rows.read(number)
        ids, starts = row.tokens.tolist(), set(row.starts.tolist())
        found.update((ids[t], ids[t + 1]) for t in range(len(ids) - 1) if t + 1 not in starts)
        assert (row.learned == (row.tokens % 3 > 0)).all()
    return found


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=40), seq_len=st.integers(2, 20))
def test_every_target_once_and_long_documents_in_near_equal_pieces(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int
) -> None:
    stream = Stream(lengths)
    rows = open_rows(tmp_path_factory.mktemp("plan"), {"a": stream}, seq_len)
    assert targets_of(rows) == stream.targets
    read = [rows.read(number) for number in range(len(rows))]
    assert all(0 < len(row.tokens) <= seq_len + 1 for row in read)
    assert rows.report.tokens == sum(len(row.tokens) for row in read)
    assert rows.report.documents == sum(len(row.starts) for row in read)
    assert rows.report.too_long == sum(length - 1 > seq_len for length in lengths)
    empty = sum(seq_len + 1 - len(row.tokens) for row in read)
    assert rows.report.padding(seq_len) == pytest.approx(empty / max(len(read) * seq_len, 1))
    pieces = [np.diff([*row.starts, len(row.tokens)]) for row in read]
    sizes = Counter(int(size) - 1 for piece in pieces for size in piece)
    expected: Counter = Counter()
    for length in lengths:
        parts = -(-(length - 1) // seq_len)
        expected.update((length - 1 + part) // parts for part in range(parts))
    assert sizes == expected
    assert len(rows.read(len(rows) + 3).tokens) == 0


def test_a_conversation_that_is_too_long_is_left_out(tmp_path: Path) -> None:
    stream = Stream([5, 30, 9, 17, 18], has_loss=True)
    rows = open_rows(tmp_path, {"a": stream}, 16)
    assert (rows.report.too_long, rows.report.documents, rows.report.tokens) == (2, 3, 31)
    assert sum(targets_of(rows).values()) == 4 + 8 + 16


@pytest.mark.parametrize("seed", range(4))
def test_length_shares_hold_over_all_sources_and_weights_choose_among_them(tmp_path: Path, seed: int) -> None:
    """25 % of tokens from documents of 32 to 127 tokens, 75 % from longer ones; shorter ones are not read."""
    chance = np.random.default_rng(seed)
    streams = {
        "books": Stream(chance.integers(100, 900, 400).tolist()),
        "code": Stream(chance.integers(2, 300, 4000).tolist(), first=10**6),
    }
    rows = open_rows(tmp_path, streams, 256, {32: 0.25, 128: 0.75}, books=1.0, code=0.5)
    tokens: Counter = Counter()
    for number in range(len(rows)):
        row = rows.read(number)
        for document in np.split(row.tokens, row.starts[1:]):
            length = len(document)
            assert length >= 32
            tokens["long" if length >= 128 else "short", "books" if document[0] <= 10**6 else "code"] += (
                length
            )
    share = sum(tokens["long", name] for name in streams) / tokens.total()
    assert share == pytest.approx(0.75, abs=0.004)
    assert rows.report.padding(256) < 0.05, "long and short documents must share rows"
    everything = open_rows(tmp_path, streams, 256)
    offered: Counter = Counter()
    for number in range(len(everything)):
        row = everything.read(number)
        for document in np.split(row.tokens, row.starts[1:]):
            kind = "long" if len(document) >= 128 else "short" if len(document) >= 32 else "none"
            offered[kind, "books" if document[0] <= 10**6 else "code"] += len(document)
    for kind in ("long", "short"):
        taken = {name: tokens[kind, name] / offered[kind, name] for name in streams}
        assert taken["code"] == pytest.approx(taken["books"] / 2, abs=0.03)
    assert (
        tokens["long", "books"] == offered["long", "books"]
        or tokens["short", "books"] == offered["short", "books"]
    )
    assert rows.report.tokens_not_taken == offered.total() - tokens.total()


def test_a_class_without_documents_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data\.length_shares: no training document is in the length classes \[40\]"
    ):
        open_rows(tmp_path, {"a": Stream([5, 20])}, 256, {4: 0.5, 40: 0.5})


def test_a_plan_is_kept_and_is_the_same_when_made_again(tmp_path: Path) -> None:
    stream = Stream([5, 9, 40, 3, 12, 7] * 5)
    first = open_rows(tmp_path, {"a": stream}, 16)
    contents = {path.name: path.read_bytes() for path in (tmp_path / "packing").iterdir()}
    assert sorted(contents) == ["p-16.items", "p-16.npz"]
    stream.document_offsets = None  # an existing plan must not be made again
    again = open_rows(tmp_path, {"a": stream}, 16)
    assert [again.read(n).tokens.tolist() for n in range(len(again))] == [
        first.read(n).tokens.tolist() for n in range(len(first))
    ]
    for path in (tmp_path / "packing").iterdir():
        path.unlink()
    open_rows(tmp_path, {"a": Stream([5, 9, 40, 3, 12, 7] * 5)}, 16)
    assert contents == {path.name: path.read_bytes() for path in (tmp_path / "packing").iterdir()}


@pytest.mark.parametrize("suffix", ["npz", "items"])
def test_a_damaged_plan_is_named(tmp_path: Path, suffix: str) -> None:
    stream = Stream([5, 9, 40, 3])
    open_rows(tmp_path, {"a": stream}, 16)
    path = tmp_path / "packing" / f"p-16.{suffix}"
    path.write_bytes(path.read_bytes()[:-16])
    with pytest.raises(DataError, match=r"p-16\.npz is damaged"):
        open_rows(tmp_path, {"a": stream}, 16)


def test_nothing_to_pack(tmp_path: Path) -> None:
    rows = open_rows(tmp_path, {"a": Stream([1, 1])}, 16)
    assert len(rows) == 0
    assert len(rows.read(0).tokens) == 0
