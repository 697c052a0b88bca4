"""Best-fit-decreasing bin packing of lengths, on their histogram: the cost does not grow with their number.

Items of one length are interchangeable, and so are bins with the same space left. Groups of equal bins are
filled at once; the spaces left are those of the item-by-item algorithm (Johnson 1973; for documents arXiv
2404.10830).
"""

import bisect
from collections import defaultdict
from typing import NamedTuple

import numpy as np

# (length, items in each bin, first item): bin j of a group has the items from first + j * items on
_Part = tuple[int, int, int]
_Group = tuple[int, tuple[_Part, ...]]  # number of bins with the same contents, and what these are


class Bins(NamedTuple):
    """What stands in each bin. Items of a length are numbered from 0.

    first_bins: [G+1] first bin of each group of like bins, and the end. first_parts: [G+1] likewise into
    `parts`, [P,3]: length, items of it in each bin, first item.
    """

    first_bins: np.ndarray
    first_parts: np.ndarray
    parts: np.ndarray

    @property
    def total(self) -> int:
        """Number of bins."""
        return int(self.first_bins[-1])

    def contents(self, number: int) -> list[tuple[int, int]]:
        """(length, item) of all items in a bin."""
        group = int(np.searchsorted(self.first_bins, number, side="right")) - 1
        j = number - int(self.first_bins[group])
        parts = self.parts[self.first_parts[group] : self.first_parts[group + 1]].tolist()
        return [
            (length, item)
            for length, per_bin, first in parts
            for item in range(first + j * per_bin, first + (j + 1) * per_bin)
        ]


def pack_lengths(counts: np.ndarray, capacity: int) -> Bins:
    """Bins of `capacity` for counts[length] items of each length from 1 to capacity.

    The longest come first, each into the bin with the least space that it fits into.
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
    return Bins(
        np.cumsum([0, *(bins for bins, _ in flat)]),
        np.cumsum([0, *(len(parts) for _, parts in flat)]),
        np.array([part for _, parts in flat for part in parts], dtype=np.int64).reshape(-1, 3),
    )
