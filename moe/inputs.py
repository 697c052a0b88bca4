"""What one forward hands to all its layers beside the hidden states."""
# B rows, S tokens per row, T = B*S tokens, D documents, P cached tokens per row
# G key/value heads, C head_dim

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moe.router import PLAIN, RoutingInputs


class Documents:
    """Borders of the documents in a batch, shared by all layers of a forward.

    cu_seqlens: [D+1] int32, the first 0, the last T. lengths: the same on the host, as the length of each
    document; without them the host waits for the device to have `cu_seqlens`. Nothing else here waits.
    """

    def __init__(self, cu_seqlens: Tensor, lengths: Sequence[int] | None = None) -> None:
        self.cu_seqlens = cu_seqlens
        self.lengths: Sequence[int] = cu_seqlens.diff().tolist() if lengths is None else lengths
        self.max_length = max(self.lengths)

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """(number of documents, length), ascending in length: the calls that attention per document makes."""
        return [(self.lengths.count(length), length) for length in sorted(set(self.lengths))]

    @cached_property
    def order(self) -> Tensor | None:
        """[T] tokens sorted by the length of their document, stably; None where they lie so already."""
        if list(self.lengths) == sorted(self.lengths):
            return None
        return self.cu_seqlens.diff()[self.number].argsort(stable=True)

    @cached_property
    def number(self) -> Tensor:
        """[T] the number of each token's document, from 0."""
        return torch.repeat_interleave(self.cu_seqlens.diff().long(), output_size=sum(self.lengths))

    @cached_property
    def borders(self) -> Tensor:
        """[D+1] int64 `cu_seqlens`, as one tensor for all layers: flash-linear-attention reads each once."""
        return self.cu_seqlens.long()

    @cached_property
    def position(self) -> Tensor:
        """[T] the place of each token in its document, from 0."""
        return torch.arange(len(self.number), device=self.number.device) - self.cu_seqlens[self.number]

    @cached_property
    def inverse(self) -> Tensor | None:
        """[T] the permutation that undoes `order`."""
        return None if self.order is None else self.order.argsort()


class Cache:
    """What the layers keep of the tokens seen so far, for generation: rows are sequences of equal length.

    length: P, the number of tokens per row that the whole model has seen.
    layers: two tensors for each, keys and values or the two states of linear attention.
    """

    def __init__(self) -> None:
        self.length = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, S, G, C] to a layer of attention; returns all its keys and values [B, P+S, G, C]."""
        if layer in self.layers:
            old_keys, old_values = self.layers[layer]
            keys, values = torch.cat((old_keys, keys), dim=1), torch.cat((old_values, values), dim=1)
        self.layers[layer] = keys, values
        return keys, values


@dataclass(frozen=True)
class LayerInputs:
    """The same for every layer; a dataclass, whose tensors DeepSpeed's hooks leave alone."""

    rotary: tuple[Tensor, Tensor]  # the tables of `moe.rope.rotary_tables` for the T tokens
    documents: Documents
    cache: Cache | None = None
    routing: RoutingInputs = PLAIN
