"""Packing "best_fit": rows of whole documents, planned once from their lengths and kept beside the shards.

    packing/<name>.items    uint64, documents by length: number of the source << 48 | first token
    packing/<name>.npz      which lengths stand together in a row, and how often; written last

A plan is a pure function of the shards and the configuration: whoever finds none makes the same one. Making
it takes memory for histograms and one shard's offsets; using it, for what is read.
"""
# P documents or pieces of documents

import hashlib
import itertools
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.bins import Bins, pack_lengths
from data_pipeline.config import DataError
from data_pipeline.fim import FillInTheMiddle
from data_pipeline.manifest import sync_folder, to_json
from data_pipeline.packing import Row, Stream
from data_pipeline.permutation import mix
from data_pipeline.shards import TokenStream, file_crc32

_ITEM = np.dtype("<u8")
_SOURCE_SHIFT = 48
_BUCKETS = 1 << 16  # under length_shares, documents are taken by hash in steps of 1/65536 of their class


class PackedSource(NamedTuple):
    """A stream to pack. weight: relative share of its documents that is taken, under length_shares."""

    stream: TokenStream
    weight: float
    fim: FillInTheMiddle | None


class PackingReport(NamedTuple):
    """rows; documents and pieces in them; their tokens; documents too long for a row (cut, or left out);
    tokens of the documents that length_shares leaves out."""

    rows: int
    documents: int
    tokens: int
    too_long: int
    tokens_not_taken: int

    def padding(self, seq_len: int) -> float:
        """Share of the positions of all rows that hold no token."""
        positions = self.rows * seq_len
        return (positions + self.rows - self.tokens) / max(positions, 1)


class BestFitRows:
    """The rows of one source, or of several together. `name` tells plans of the folder apart.

    Raises DataError for a plan that is damaged, and where length_shares ask for what no document has.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        sources: dict[str, PackedSource],
        seq_len: int,
        length_shares: dict[int, float],
    ) -> None:
        self._sources, self._seq_len = list(sources.values()), seq_len
        if length_shares:
            weights = {source: settings.weight for source, settings in sources.items()}
            what = to_json([weights, sorted(length_shares.items())])
            name += "-" + hashlib.sha256(what).hexdigest()[:8]
        path = folder / "packing" / f"{name}-{seq_len}.npz"
        items_path = path.with_suffix(".items")
        if not path.exists():
            _make_plan(self._sources, seq_len, length_shares, path)
        try:
            with np.load(path) as plan:
                self.report = PackingReport(*plan["report"].tolist())
                self._bins = Bins(plan["first_bins"], plan["first_parts"], plan["parts"])
                self._first_items = np.cumsum(plan["counts"]) - plan["counts"]  # by length
            self._items = np.memmap(items_path, _ITEM, "r") if self.report.documents else np.empty(0, _ITEM)
            if len(self._items) != self.report.documents:
                raise ValueError(f"{items_path} has {len(self._items)} items, not {self.report.documents}")
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is damaged ({error}); remove it, it is made again") from error
        self.mean_tokens = (self.report.tokens - self.report.rows) / max(self.report.rows, 1)

    def __len__(self) -> int:
        return self.report.rows

    def describe(self) -> str:
        """What an epoch is, and what packing made of the documents."""
        rows, documents, _, too_long, left_out = self.report
        return (
            f"{documents:,} documents in {rows:,} rows of {self._seq_len},"
            f" {self.report.padding(self._seq_len):.2%} padding"
            + (f", {too_long:,} longer than a row" if too_long else "")
            + (f", {left_out:,} tokens left out" if left_out else "")
        )

    def places(self, row: int) -> list[tuple[Stream, int]]:
        """For each document of a row, its stream and the token there that its part begins with."""
        return [(source.stream, start) for source, start, _ in self._contents(row)]

    def read(self, row: int) -> Row:
        """Row number `row`; an empty one beyond the last."""
        tokens, learned, lengths = [], [], []
        for source, start, length in self._contents(row):
            document = source.stream.read(start, start + length)
            if source.fim is not None:
                document = source.fim(document, start)
            tokens.append(document)
            lengths.append(length)
            learned.append(source.stream.read_loss(start, start + length))
        if not tokens:
            return Row(np.empty(0, np.uint32), np.empty(0, np.int64), np.empty(0, np.bool_))
        return Row(np.concatenate(tokens), np.cumsum(lengths) - lengths, np.concatenate(learned))

    def _contents(self, row: int) -> Iterator[tuple[PackedSource, int, int]]:
        """Source, first token and length of each part of a row."""
        for length, item in self._bins.contents(row) if row < len(self) else ():
            place = int(self._items[self._first_items[length] + item])
            yield self._sources[place >> _SOURCE_SHIFT], place & ((1 << _SOURCE_SHIFT) - 1), length


def _make_plan(sources: list[PackedSource], seq_len: int, shares: dict[int, float], path: Path) -> None:
    """Write a plan, all of it or nothing; several processes may do it at once."""
    taken = _buckets_taken(sources, seq_len, shares)
    counts = np.zeros(seq_len + 2, dtype=np.int64)  # by length
    for _, _, lengths in _taken_pieces(sources, seq_len, shares, taken):
        counts += np.bincount(lengths, minlength=len(counts))
    bins = pack_lengths(counts, seq_len + 1)

    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.touch()
    if counts.any():
        items = np.memmap(partial, _ITEM, "w+", shape=int(counts.sum()))
        next_items = np.cumsum(counts) - counts
        for source, starts, lengths in _taken_pieces(sources, seq_len, shares, taken):
            order = np.argsort(lengths, kind="stable")
            of_length = np.bincount(lengths, minlength=len(counts))
            within = np.arange(len(order)) - np.repeat(np.cumsum(of_length) - of_length, of_length)
            items[np.repeat(next_items, of_length) + within] = starts[order] | (source << _SOURCE_SHIFT)
            next_items += of_length
        items.flush()
    items_crc32 = file_crc32(partial)
    os.replace(partial, path.with_suffix(".items"))
    tokens = int(counts @ np.arange(len(counts)))
    offered = sum(int(lengths.sum()) for _, _, lengths in _pieces(sources, seq_len))
    offsets = itertools.chain.from_iterable(source.stream.document_offsets() for source in sources)
    too_long = sum(int((np.diff(of_shard) - 1 > seq_len).sum()) for of_shard in offsets)
    report = PackingReport(bins.total, int(counts.sum()), tokens, too_long, offered - tokens)
    with open(partial, "wb") as file:
        np.savez(
            file, report=np.array(report), counts=counts, items_crc32=np.array(items_crc32), **bins._asdict()
        )
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def _pieces(sources: list[PackedSource], seq_len: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each shard: source number, and first tokens [P] and lengths [P] of what fits into rows.

    A longer document is cut into the fewest pieces, of near-equal length; each ends with the token that the
    next begins with, so that every token but the first is predicted once. A conversation is left out instead:
    its pieces would be answers without their questions. Closing ids alone are left out too.
    """
    for number, source in enumerate(sources):
        for offsets in source.stream.document_offsets():
            starts, targets = offsets[:-1], np.diff(offsets) - 1
            parts = -(-targets // seq_len)
            if source.stream.has_loss:
                parts[parts > 1] = 0
            document = np.repeat(np.arange(len(parts)), parts)
            part = np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)
            first = targets[document] * part // parts[document]
            last = targets[document] * (part + 1) // parts[document]
            yield number, starts[document] + first, last - first + 1


def _taken_pieces(
    sources: list[PackedSource], seq_len: int, shares: dict[int, float], taken: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The `_pieces` whose hash falls into the buckets that their source and class may use."""
    for source, starts, lengths in _pieces(sources, seq_len):
        if shares:
            chosen = _buckets(starts) < taken[source, _classes(lengths, shares)]
            starts, lengths = starts[chosen], lengths[chosen]
        yield source, starts, lengths


def _buckets_taken(sources: list[PackedSource], seq_len: int, shares: dict[int, float]) -> np.ndarray:
    """[source, class] how many hash buckets are taken, so that the classes have their shares of tokens.

    As many documents as the shares allow are taken: of the scarcest class, all of the heaviest source.
    """
    if not shares:
        return np.empty((0, 0))
    tokens = np.zeros((len(sources), len(shares) + 1, _BUCKETS))  # class 0: too short
    for source, starts, lengths in _pieces(sources, seq_len):
        places = _classes(lengths, shares) * _BUCKETS + _buckets(starts)
        tokens[source] += np.bincount(places, lengths, tokens[0].size).reshape(tokens[0].shape)
    weights = np.array([source.weight for source in sources])
    offered = tokens.sum(axis=2) * (weights / weights.max())[:, None]  # [source, class]
    of_class, wanted = offered.sum(axis=0), np.array([0.0, *(shares[least] for least in sorted(shares))])
    missing = [least for least, count in zip(sorted(shares), of_class[1:], strict=True) if not count]
    if missing:
        raise DataError(
            f"data.length_shares: no training document is of the lengths from {missing} tokens on, with"
            f" stage.seq_len={seq_len}; change the lengths or add such documents"
        )
    total = (of_class[1:] / wanted[1:]).min()
    target = offered * total * wanted / np.maximum(of_class, 1)
    before_middle = np.cumsum(tokens, axis=2) - tokens / 2
    return (before_middle < target[:, :, None]).sum(axis=2)  # the number of buckets nearest to the target


def _classes(lengths: np.ndarray, shares: dict[int, float]) -> np.ndarray:
    return np.searchsorted(sorted(shares), lengths, side="right")


def _buckets(starts: np.ndarray) -> np.ndarray:
    return (mix(starts.astype(np.uint64)) >> 48).astype(np.int64)
