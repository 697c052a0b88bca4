"""The order of the run: global row g -> (source, epoch, row of the source), a pure function of the
configuration.

Rows are dealt in blocks. Each block holds a fixed integer quota of every source, spread evenly over the
block; the rows of a source are dealt one after the other, through a permutation of its own in every epoch.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data_pipeline.config import BLOCK_ROWS, DataError
from data_pipeline.permutation import Permutation, derive_key, mix


class Location(NamedTuple):
    """Where a global row comes from: the row is in range(rows of the source)."""

    source: str
    epoch: int
    row: int


@dataclass
class MixtureSource:
    """weight: relative share of the rows. rows: in one epoch. max_epochs: None = no limit."""

    weight: float
    rows: int
    max_epochs: float | None


def integer_quotas(weights: list[float], total: int) -> list[int]:
    """Integers that sum to `total`, each within one of its exact share (method of the largest remainder)."""
    shares = [weight * total / sum(weights) for weight in weights]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (quotas[i] - shares[i], i))
    for i in by_remainder[: total - sum(quotas)]:
        quotas[i] += 1
    return quotas


class Mixture:
    """The infinite sequence of rows that the weights, the seed and the number of rows of every source define.

    Sources are taken in the order of their names, so the order of a YAML file does not matter; those of
    weight 0 are left out. Raises DataError for a source that is to be read and has no row.
    """

    def __init__(self, sources: dict[str, MixtureSource], seed: int) -> None:
        self.seed = seed
        self.names = sorted(name for name, source in sources.items() if source.weight > 0)
        self.sources = [sources[name] for name in self.names]
        empty = [name for name, source in zip(self.names, self.sources, strict=True) if source.rows < 1]
        if empty:
            raise DataError(
                f"data.sources {', '.join(empty)}: no whole row of training text;"
                " add text, shorten stage.seq_len, or set the weight to 0"
            )
        self.quotas = np.array(integer_quotas([source.weight for source in self.sources], BLOCK_ROWS))
        self.limits = [1 << 62 if s.max_epochs is None else int(s.max_epochs * s.rows) for s in self.sources]
        self._block = lru_cache(maxsize=2)(self._deal_block)
        self._permutation = lru_cache(maxsize=2 * len(self.names))(self._permute_epoch)

    def locate(self, row: int) -> Location:
        """Where global row `row` comes from. Raises DataError beyond a source's max_epochs."""
        block, slot = divmod(row, BLOCK_ROWS)
        dealt, ranks = self._block(block)
        i = int(dealt[slot])
        index = block * int(self.quotas[i]) + int(ranks[slot])
        if index >= self.limits[i]:
            self.check_budget(row + 1)
        epoch, index = divmod(index, self.sources[i].rows)
        return Location(self.names[i], epoch, self._permutation(i, epoch)(index))

    def rows_available(self) -> int | None:
        """How many rows can be served before a source is exhausted (max_epochs); None = no limit."""
        if all(source.max_epochs is None for source in self.sources):
            return None
        limits = np.array(self.limits)
        block = int((limits // self.quotas).min())
        dealt, ranks = self._block(block)
        return block * BLOCK_ROWS + int(np.argmax(ranks >= (limits - block * self.quotas)[dealt]))

    def rows_needed(self, total_rows: int) -> dict[str, int]:
        """How many of the rows 0 .. total_rows - 1 come from each source."""
        blocks, rest = divmod(total_rows, BLOCK_ROWS)
        dealt = self._block(blocks)[0][:rest]
        counts = blocks * self.quotas + np.bincount(dealt, minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))

    def check_budget(self, total_rows: int) -> None:
        """Raise a DataError that lists every source which max_epochs keeps from serving `total_rows` rows."""
        exhausted = [
            f"data.sources.{name}.max_epochs={source.max_epochs} allows {limit} rows of its {source.rows},"
            f" but {total_rows} rows of the run need {needed}; raise max_epochs, lower its weight,"
            " or train on fewer tokens"
            for (name, needed), source, limit in zip(
                self.rows_needed(total_rows).items(), self.sources, self.limits, strict=True
            )
            if needed > limit
        ]
        if exhausted:
            raise DataError("\n".join(exhausted))

    def _deal_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source number of each slot of a block, and how many earlier slots of the block have the same
        source.

        Card k of a source with quota q lies at a random time in [k, k+1) / q; slots are in the order of time.
        So every stretch of the block, not only the whole, holds every source close to its share.
        """
        dealt = np.repeat(np.arange(len(self.quotas)), self.quotas)
        ranks = np.concatenate([np.arange(quota) for quota in self.quotas])
        words = np.arange(BLOCK_ROWS, dtype=np.uint64) + np.uint64(derive_key(self.seed, "block", block) >> 1)
        times = (ranks + (mix(words) >> 11) / 2.0**53) / self.quotas[dealt]
        order = np.argsort(times, kind="stable")
        return dealt[order], ranks[order]

    def _permute_epoch(self, source: int, epoch: int) -> Permutation:
        return Permutation(self.sources[source].rows, derive_key(self.seed, self.names[source], epoch))
