"""The order of the run: global row g -> (source, epoch, row), a pure function of the configuration.

Rows are dealt in blocks. Each block holds a fixed integer quota of every source, spread evenly over the
block; the rows of a source are dealt in the order of a permutation, which is different in every epoch.
Weights may change at given rows: new blocks begin there, and every source goes on with its next row.
"""

import bisect
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data_pipeline.config import BLOCK_ROWS, DataError
from data_pipeline.permutation import Permutation, derive_key, mix

Changes = dict[int, dict[str, float]] | None  # row -> weights of sources from that row on


class Location(NamedTuple):
    """The source of a global row, the epoch of the source, and the number of the row in that source."""

    source: str
    epoch: int
    row: int


class MixtureSource(NamedTuple):
    """The properties of a source that decide the order."""

    weight: float  # relative share of the tokens
    rows: int  # in one epoch
    max_epochs: float | None  # None = no limit
    row_tokens: float  # tokens in a row, on average


class _Stretch(NamedTuple):
    """Rows from `first` on have these quotas; before, `dealt` [source] rows of each source were dealt."""

    first: int
    quotas: np.ndarray
    dealt: np.ndarray


def integer_quotas(weights: list[float], total: int) -> list[int]:
    """Integers that sum to `total`, each less than 1 away from its exact share (largest remainder method)."""
    shares = [weight * total / sum(weights) for weight in weights]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (quotas[i] - shares[i], i))
    for i in by_remainder[: total - sum(quotas)]:
        quotas[i] += 1
    return quotas


class Mixture:
    """The infinite sequence of rows that the weights, the seed and the number of rows of every source define.

    Sources are taken in the order of their names; sources whose weight is always 0 are left out. A source's
    share of the tokens is proportional to weight * (tokens of an epoch)^alpha: with alpha=0 to its weight
    alone, with alpha=1 and equal weights to its size (arXiv 1907.05019, section 3, with alpha = 1/T). Without
    `shuffle` the rows of a source keep their order. Raises DataError for a source with a weight but no row,
    or with too small a share for a row in each block.
    """

    def __init__(
        self,
        sources: dict[str, MixtureSource],
        seed: int,
        changes: Changes = None,
        alpha: float = 0.0,
        shuffle: bool = True,
    ) -> None:
        self._seed, self._shuffle = seed, shuffle
        later = sorted((changes or {}).items())
        stages = [{name: source.weight for name, source in sources.items()}, *(w for _, w in later)]
        self._names = sorted({name for stage in stages for name, weight in stage.items() if weight > 0})
        self.sources = {name: sources[name] for name in self._names}
        if empty := [name for name, source in self.sources.items() if source.rows < 1]:
            what = f"data.sources {', '.join(empty)}: no whole row of training text"
            raise DataError(f"{what}; add text, shorten stage.seq_len, or set the weight to 0")
        self._limits = {
            name: math.inf if source.max_epochs is None else int(source.max_epochs * source.rows)
            for name, source in self.sources.items()
        }
        self._block = lru_cache(maxsize=2)(self._deal_block)
        self._permutation = lru_cache(maxsize=2 * len(self._names))(self._permute_epoch)
        self._stretches: list[_Stretch] = []
        weights: dict[str, float] = {}
        dealt = np.zeros(len(self._names), dtype=np.int64)
        for first, stage in zip([0, *(row for row, _ in later)], stages, strict=True):
            if self._stretches:
                dealt = self._dealt(first)
            weights |= stage
            row_shares = [
                weights[name] * (source.rows * source.row_tokens) ** alpha / source.row_tokens
                for name, source in self.sources.items()
            ]
            quotas = np.array(integer_quotas(row_shares, BLOCK_ROWS))
            if lost := [n for n, q in zip(self._names, quotas, strict=True) if weights[n] and not q]:
                what = f"data.sources {', '.join(lost)}: less than one row in {BLOCK_ROWS} would be read"
                raise DataError(f"{what}; raise the weight, lower data.weights.alpha, or set the weight to 0")
            self._stretches.append(_Stretch(first, quotas, dealt))

    def locate(self, row: int) -> Location:
        """Where global row `row` comes from. Raises DataError beyond a source's max_epochs."""
        number = self._stretch_of(row)
        stretch = self._stretches[number]
        block, slot = divmod(row - stretch.first, BLOCK_ROWS)
        sources, ranks = self._block(number, block)
        i = int(sources[slot])
        name, index = self._names[i], int(stretch.dealt[i] + block * stretch.quotas[i] + ranks[slot])
        if index >= self._limits[name]:
            self.check_budget(row + 1)
        epoch, index = divmod(index, self.sources[name].rows)
        return Location(name, epoch, self._permutation(name, epoch)(index) if self._shuffle else index)

    def rows_needed(self, total_rows: int) -> dict[str, int]:
        """How many of the rows 0 .. total_rows - 1 come from each source."""
        return dict(zip(self._names, self._dealt(total_rows).tolist(), strict=True))

    def check_budget(self, total_rows: int) -> None:
        """Raise a DataError that lists every source whose max_epochs is too low for `total_rows` rows."""
        exhausted = []
        for name, needed in self.rows_needed(total_rows).items():
            source, limit = self.sources[name], self._limits[name]
            if needed > limit:
                law = f"max_epochs={source.max_epochs} allows {limit} rows ({source.rows} in an epoch)"
                need = f"but {total_rows} rows of the run need {needed}"
                remedy = "raise max_epochs, lower its weight, or train on fewer tokens"
                exhausted.append(f"data.sources.{name}.{law}, {need}; {remedy}")
        if exhausted:
            raise DataError("\n".join(exhausted))

    def _stretch_of(self, row: int) -> int:
        return bisect.bisect_right(self._stretches, row, key=lambda stretch: stretch.first) - 1

    def _dealt(self, rows: int) -> np.ndarray:
        """[source] how many of the rows 0 .. rows - 1 come from each."""
        number = self._stretch_of(rows)
        stretch = self._stretches[number]
        blocks, rest = divmod(rows - stretch.first, BLOCK_ROWS)
        of_last_block = np.bincount(self._block(number, blocks)[0][:rest], minlength=len(self._names))
        return stretch.dealt + blocks * stretch.quotas + of_last_block

    def _deal_block(self, stretch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source number of each slot of a block, and the number of earlier slots with the same source.

        Row k of a source with quota q gets a random time in [k, k+1) / q, and the slots are sorted by time.
        So every part of the block, not only the whole block, has nearly the right share of every source.
        """
        quotas = self._stretches[stretch].quotas
        dealt = np.repeat(np.arange(len(quotas)), quotas)
        ranks = np.concatenate([np.arange(quota) for quota in quotas])
        words = np.arange(BLOCK_ROWS, dtype=np.uint64)
        words += np.uint64(derive_key(self._seed, "block", stretch, block) >> 1)
        times = (ranks + (mix(words) >> 11) / 2.0**53) / quotas[dealt]
        order = np.argsort(times, kind="stable")
        return dealt[order], ranks[order]

    def _permute_epoch(self, name: str, epoch: int) -> Permutation:
        return Permutation(self.sources[name].rows, derive_key(self._seed, name, epoch))


def skip_rows(row: int, skip: list[list[int]]) -> int:
    """Turn the number of a row outside `skip`, sorted ranges [first, end), into its number among all rows."""
    for first, end in skip:
        if row >= first:
            row += end - first
    return row
