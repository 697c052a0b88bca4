"""The borders of the documents of a batch."""
# T = B*S tokens, D documents

from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class Documents:
    """Borders of the documents in a batch, shared by all layers of a forward.

    cu_seqlens: [D+1] int32, the first 0, the last T. lengths: the length of each document, on the host; None
    reads them from `cu_seqlens`, which waits for the device. Nothing else here waits.
    """

    def __init__(self, cu_seqlens: Tensor, lengths: Sequence[int] | None = None) -> None:
        self.cu_seqlens = cu_seqlens
        self.lengths: Sequence[int] = cu_seqlens.diff().tolist() if lengths is None else lengths
        self.max_length = max(self.lengths)

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """(number of documents, length) for each length, ascending: the calls of `attend_per_document`."""
        return [(count, length) for length, count in sorted(Counter(self.lengths).items())]

    @cached_property
    def order(self) -> Tensor | None:
        """[T] tokens sorted stably by the length of their document; None if they are already sorted."""
        if list(self.lengths) == sorted(self.lengths):
            return None
        return self.cu_seqlens.diff()[self.number].argsort(stable=True)

    @cached_property
    def number(self) -> Tensor:
        """[T] the number of each token's document, from 0."""
        return torch.repeat_interleave(self.cu_seqlens.diff().long(), output_size=sum(self.lengths))

    @cached_property
    def borders(self) -> Tensor:
        """[D+1] `cu_seqlens` in int64, one tensor for all layers: flash-linear-attention reads it once."""
        return self.cu_seqlens.long()

    @cached_property
    def position(self) -> Tensor:
        """[T] the position of each token in its document, from 0."""
        return torch.arange(len(self.number), device=self.number.device) - self.cu_seqlens[self.number]

    @cached_property
    def inverse(self) -> Tensor | None:
        """[T] the permutation that undoes `order`."""
        return None if self.order is None else self.order.argsort()
