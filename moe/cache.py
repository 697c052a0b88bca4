"""What a model keeps of earlier tokens while it samples."""
# B sequences, T tokens of a forward, D documents, G key/value heads, C head_dim

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from moe.documents import Documents


class Cache:
    """What the layers keep of earlier tokens, for sampling: a row for each sequence, each of its own length.

    A forward either begins sequences (`prefill`) or computes one more token of every sequence (`decode`).
    rows: how many sequences it can hold. lengths: how many tokens it holds of each sequence, on the host.
    """

    def __init__(self, rows: int, device: torch.device | str = "cpu") -> None:
        self.rows, self.device = rows, device
        self.lengths: list[int] = []
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def prefill(self, lengths: Sequence[int]) -> "CacheStep":
        """The next forward computes new sequences of these lengths, packed in one row [1, T]."""
        first = len(self.lengths)
        self.lengths += lengths
        assert len(self.lengths) <= self.rows, "more sequences than rows"
        borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.device)
        documents = Documents(borders, lengths)
        return CacheStep(self, documents, documents.number + first, documents.position)

    def decode(self) -> "CacheStep":
        """The next forward computes one more token of every sequence: [B, 1]."""
        rows = torch.arange(len(self.lengths) + 1, device=self.device)
        seen = torch.tensor(self.lengths, device=self.device)
        self.lengths = [length + 1 for length in self.lengths]
        visible = torch.arange(max(self.lengths), device=self.device) <= seen.unsqueeze(1)
        documents = Documents(rows.int(), [1] * len(self.lengths))
        return CacheStep(self, documents, rows[:-1], seen, visible)

    def drop(self, ended: Collection[int]) -> list[int]:
        """Forget some sequences; the last ones take their rows. Returns the former row of each one left.

        So the sequences are always the first rows, and a decode reads them where they are.
        """
        count = len(self.lengths) - len(ended)
        movers = [row for row in range(count, len(self.lengths)) if row not in ended]
        kept = [movers.pop() if row in ended else row for row in range(count)]
        if moved := [row for row in range(count) if kept[row] != row]:
            to = torch.tensor(moved, device=self.device)
            source = torch.tensor([kept[row] for row in moved], device=self.device)
            for held in chain.from_iterable(self._layers.values()):
                held[to] = held[source]
        self.lengths = [self.lengths[row] for row in kept]
        return kept

    def storage(
        self, layer: int, like: tuple[Tensor, Tensor], capacity: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The two tensors [rows, capacity, ...], without `capacity` [rows, ...], of a layer; zero at first.

        like: what is to be written, [N, ...] each. The capacity grows when it must, by half at least.
        """
        held = self._layers.get(layer)
        if held is None or (capacity is not None and held[0].shape[1] < capacity):
            old = 0 if held is None else held[0].shape[1]
            room = () if capacity is None else (max(capacity, old + old // 2),)
            new = tuple(x.new_zeros(self.rows, *room, *x.shape[1:]) for x in like)
            for wide, narrow in zip(new, held or (), strict=False):
                wide[:, :old] = narrow
            held = self._layers[layer] = (new[0], new[1])
        return held


@dataclass(frozen=True)
class CacheStep:
    """What one forward does with a cache; the model is given its borders and positions too."""

    cache: Cache
    documents: Documents  # of the prefill, or one token each
    row: Tensor  # [T] int64, the row of each token
    position: Tensor  # [T] int64, the position of each token in its sequence
    visible: Tensor | None = None  # decode: [B, longest] bool, the tokens that each new token attends to

    def add_tokens(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write [T, G, C] of an attention layer; returns those of all sequences [B, longest, G, C]."""
        lengths = self.cache.lengths
        held = self.cache.storage(layer, (key, value), max(lengths))
        for mine, new in zip(held, (key, value), strict=True):
            mine[self.row, self.position] = new
        return held[0][: len(lengths), : max(lengths)], held[1][: len(lengths), : max(lengths)]

    def states(self, layer: int, nothing: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The two states [D, ...] of a linear attention layer, to be overwritten by those after this forward.

        nothing: the states [1, ...] of a sequence that begins.
        """
        rows = slice(len(self.cache.lengths) - len(self.documents.lengths), len(self.cache.lengths))
        first, second = (held[rows] for held in self.cache.storage(layer, nothing))
        if self.visible is None:
            first.copy_(nothing[0])
            second.copy_(nothing[1])
        return first, second
