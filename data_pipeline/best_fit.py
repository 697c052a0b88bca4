"""Plans of packing "best_fit": which documents fill each row. They are stored beside the shards.

    packing/<name>.items    uint64, documents sorted by length: number of the source << 48 | first token
    packing/<name>.npz      which lengths share a row, and in how many rows; written last

A plan is a pure function of the shards and the configuration: every process that finds none makes the same
one. Making a plan needs memory for histograms and for the offsets of one shard; using it needs memory for
the .npz file and for the items that are read.
"""
# G groups of equal bins, P parts of groups; in _pieces, P documents or pieces of documents

import bisect
import itertools
import uuid
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.config import DataError
from data_pipeline.manifest import replace_synced
from data_pipeline.permutation import mix
from data_pipeline.shards import TokenStream, file_crc32

ITEM = np.dtype("<u8")
STREAM_SHIFT = 48
_BUCKETS = 1 << 16  # under length_shares, documents are selected by hash, in steps of 1/65536 of their class

Shares = dict[int, float]  # least length of a document -> share of the tokens
# (length, items in each bin, first item): bin j of a group has `items` items, from first + j * items on
_Part = tuple[int, int, int]
_Group = tuple[int, tuple[_Part, ...]]  # number of bins with the same contents, and these contents


class Bins(NamedTuple):
    """The contents of each bin. Items of the same length are numbered from 0."""

    first_bins: np.ndarray  # [G+1] first bin of each group of equal bins, then the number of bins
    first_parts: np.ndarray  # [G+1] first row of `parts` of each group, then P
    parts: np.ndarray  # [P,3] length, items of it in each bin, first item

    @property
    def total(self) -> int:
        return int(self.first_bins[-1])

    def contents(self, number: int) -> list[tuple[int, int]]:
        """(length, item) of all items in a bin."""
        group = int(np.searchsorted(self.first_bins, number, side="right")) - 1
        j = number - int(self.first_bins[group])
        parts = self.parts[self.first_parts[group] : self.first_parts[group + 1]].tolist()
        return [(length, first + j * n + i) for length, n, first in parts for i in range(n)]


def pack_lengths(counts: np.ndarray, capacity: int) -> Bins:
    """Bins of `capacity` for counts[length] items of each length from 1 to capacity.

    Best-fit-decreasing (Johnson 1973; for documents arXiv 2404.10830): the longest items come first, and each
    goes into the fullest bin that has room for it. Items of the same length are interchangeable, and so are
    bins with the same space left: equal bins are filled together, so the cost does not grow with the number
    of items.
    """
    assert len(counts) <= capacity + 1, (len(counts), capacity)
    groups: defaultdict[int, list[_Group]] = defaultdict(list)  # space left -> groups of bins
    spaces: list[int] = []  # the keys of `groups`, sorted

    def put(space: int, group: _Group) -> None:
        if not groups[space]:
            bisect.insort(spaces, space)
        groups[space].append(group)

    for length in np.flatnonzero(counts)[::-1].tolist():
        left, item = int(counts[length]), 0
        while left:
            at = bisect.bisect_left(spaces, length)
            if at < len(spaces):
                space = spaces[at]
                bins, parts = groups[space].pop()
                if not groups[space]:
                    del spaces[at]
            else:
                space, bins, parts = capacity, -(-left // (capacity // length)), ()
            each = min(space // length, left)  # items that a bin takes before the next one is opened
            if (full := left // each) < bins:  # the other bins stay as they are
                put(space, (bins - full, tuple((n, of, first + full * of) for n, of, first in parts)))
                bins = full
            put(space - each * length, (bins, (*parts, (length, each, item))))
            left -= bins * each
            item += bins * each
    flat = [group for space in spaces for group in groups[space]]
    contents = np.array([part for _, parts in flat for part in parts], dtype=np.int64).reshape(-1, 3)
    first_parts = np.cumsum([0, *(len(parts) for _, parts in flat)])
    return Bins(np.cumsum([0, *(bins for bins, _ in flat)]), first_parts, contents)


class PackingReport(NamedTuple):
    """The result of packing."""

    rows: int
    documents: int  # documents and pieces of documents in the rows
    tokens: int  # of these documents and pieces
    too_long: int  # documents that are cut and conversations that are left out
    tokens_not_taken: int  # tokens of the documents that length_shares leaves out

    def padding(self, seq_len: int) -> float:
        """Share of the positions of all rows that hold no token."""
        positions = self.rows * seq_len
        return (positions + self.rows - self.tokens) / max(positions, 1)


def make_plan(
    streams: list[TokenStream], weights: list[float], seq_len: int, shares: Shares, path: Path
) -> None:
    """Write the plan `path` of the rows that the streams fill together. The file appears only when it is
    complete; several processes may write it at once. weights: under length_shares, the relative share of
    each stream's documents that is taken."""
    taken = _buckets_taken(streams, weights, seq_len, shares) if shares else None
    counts = np.zeros(seq_len + 2, dtype=np.int64)  # by length
    for _, _, lengths in _pieces(streams, seq_len, shares, taken):
        counts += np.bincount(lengths, minlength=len(counts))
    bins = pack_lengths(counts, seq_len + 1)

    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # other nodes may use the same process id
    partial.touch()
    if counts.any():
        items = np.memmap(partial, ITEM, "w+", shape=int(counts.sum()))
        next_items = np.cumsum(counts) - counts
        for stream, starts, lengths in _pieces(streams, seq_len, shares, taken):
            order = np.argsort(lengths, kind="stable")
            of_length = np.bincount(lengths, minlength=len(counts))
            within = np.arange(len(order)) - np.repeat(np.cumsum(of_length) - of_length, of_length)
            items[np.repeat(next_items, of_length) + within] = starts[order] | (stream << STREAM_SHIFT)
            next_items += of_length
        items.flush()
    items_crc32 = file_crc32(partial)
    replace_synced(partial, path.with_suffix(".items"))
    tokens = int(counts @ np.arange(len(counts)))
    offered = sum(int(lengths.sum()) for _, _, lengths in _pieces(streams, seq_len)) if shares else tokens
    offsets = itertools.chain.from_iterable(stream.document_offsets() for stream in streams)
    too_long = sum(int((np.diff(of_shard) - 1 > seq_len).sum()) for of_shard in offsets)
    report = PackingReport(bins.total, int(counts.sum()), tokens, too_long, offered - tokens)
    with open(partial, "wb") as file:
        np.savez(file, report=report, counts=counts, items_crc32=items_crc32, **bins._asdict())
    replace_synced(partial, path)


def _pieces(
    streams: list[TokenStream], seq_len: int, shares: Shares | None = None, taken: np.ndarray | None = None
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each shard: number of the stream, first tokens [P] and lengths [P] of the pieces for the rows; with
    `taken`, only of the pieces in hash buckets that are taken for their stream and length class.

    A longer document is cut into the fewest possible pieces of nearly equal length. Each piece ends with the
    token that the next one begins with, so that every token except the first is predicted once. A longer
    conversation is left out, because its pieces would be answers without their questions. A document that is
    only a closing id is left out too.
    """
    for number, stream in enumerate(streams):
        for offsets in stream.document_offsets():
            starts, targets = offsets[:-1], np.diff(offsets) - 1
            parts = -(-targets // seq_len)
            if stream.has_loss:
                parts[parts > 1] = 0
            document = np.repeat(np.arange(len(parts)), parts)
            part = np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)
            first = targets[document] * part // parts[document]
            last = targets[document] * (part + 1) // parts[document]
            starts, lengths = starts[document] + first, last - first + 1
            if shares and taken is not None:
                chosen = _buckets(starts) < taken[number, _classes(lengths, shares)]
                starts, lengths = starts[chosen], lengths[chosen]
            yield number, starts, lengths


def _buckets_taken(
    streams: list[TokenStream], weights: list[float], seq_len: int, shares: Shares
) -> np.ndarray:
    """[stream, class] number of hash buckets to take, so that the classes get their shares of the tokens.

    Takes as many documents as the shares allow: from the class that is scarcest relative to its share, it
    takes all documents of the stream with the largest weight.
    """
    tokens = np.zeros((len(streams), len(shares) + 1, _BUCKETS))  # class 0: too short
    for stream, starts, lengths in _pieces(streams, seq_len):
        places = _classes(lengths, shares) * _BUCKETS + _buckets(starts)
        tokens[stream] += np.bincount(places, lengths, tokens[0].size).reshape(tokens[0].shape)
    offered = tokens.sum(axis=2) * (np.array(weights) / max(weights))[:, None]  # [stream, class]
    of_class, wanted = offered.sum(axis=0), np.array([0.0, *(shares[least] for least in sorted(shares))])
    if missing := [least for least, of in zip(sorted(shares), of_class[1:], strict=True) if not of]:
        law = f"no training document is in the length classes {missing} with stage.seq_len={seq_len}"
        raise DataError(f"data.length_shares: {law}; change the lengths or add such documents")
    target = offered * (of_class[1:] / wanted[1:]).min() * wanted / np.maximum(of_class, 1)
    before_middle = np.cumsum(tokens, axis=2) - tokens / 2
    return (before_middle < target[:, :, None]).sum(axis=2)  # the number of buckets nearest to the target


def _classes(lengths: np.ndarray, shares: Shares) -> np.ndarray:
    return np.searchsorted(sorted(shares), lengths, side="right")


def _buckets(starts: np.ndarray) -> np.ndarray:
    return (mix(starts.astype(np.uint64)) >> 48).astype(np.int64)
