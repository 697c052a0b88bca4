"""Rows of (token, column) pairs sorted by group: gather tokens into rows, sum rows back into tokens.

The experts group the (token, k) slots by expert; the dispatchers group tokens by destination rank.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from moe.kernels.support import run_on

# T tokens, C columns, G groups, M rows (pairs that belong to a group), D width of a token
# K slots per token, E experts of this rank, H hidden, I intermediate


class Routes(NamedTuple):
    """The routing of each token to the E experts of this rank."""

    weights: Tensor  # [T,K]
    experts: Tensor  # [T,K]; the id E means that this rank does not have the expert: such a slot adds nothing
    num_rows: int | None = None  # slots with an id below E; None counts them, which waits for a CUDA device


class ExpertWeights(NamedTuple):
    """The stacked weights of E experts down(silu(gate(x)) * up(x))."""

    gate_up: Tensor  # [E,2I,H], for each expert first gate, then up
    down: Tensor  # [E,H,I]


class Grouping(NamedTuple):
    """Which token each row holds and which rows each token has; only tensors, which autograd can save."""

    token: Tensor  # [M] int64, the token of each row
    slot: Tensor  # [M] int64, token * C + column of each row
    ends: Tensor  # [G] int32, one past the last row of each group
    bag_rows: Tensor  # [M] int64, the rows in the order of their tokens
    bag_starts: Tensor  # [T] int64, where a token's rows begin in bag_rows

    @classmethod
    def by(
        cls, groups: Tensor, num_groups: int, num_rows: int | Callable[[], int] | None = None
    ) -> "Grouping":
        """Group the pairs by `groups` [T,C]; the value `num_groups` means that the pair has no row.

        `num_rows` is the number of pairs that have a row; None counts them, which waits for a CUDA device. A
        function that returns the number is called only after the sort has been queued on the device.
        """
        flat = groups.flatten()
        present = flat < num_groups  # [T*C]
        small = torch.uint8 if num_groups < 256 else torch.int16  # sorting bytes is several times faster
        keys, order = flat.to(small).sort(stable=True)
        ids = torch.arange(num_groups, dtype=small, device=flat.device)
        ends = torch.searchsorted(keys, ids, right=True, out_int32=True)
        rank = present.cumsum(0) - present.long()  # [T*C] number of rows of the pairs before this one
        if num_rows is None:
            num_rows = int(present.sum())
        elif callable(num_rows):
            num_rows = num_rows()
        slot = order[:num_rows]
        bag_rows = torch.empty_like(slot)
        bag_rows[rank[slot]] = torch.arange(num_rows, device=flat.device)
        bag_starts = rank.view_as(groups)[:, 0].contiguous()
        return cls(slot // groups.shape[1], slot, ends, bag_rows, bag_starts)

    def gather(self, tokens: Tensor) -> Tensor:
        """[T,D] -> [M,D]: the token of every row."""
        return _Gather.apply(tokens, self)

    def combine(self, rows: Tensor) -> Tensor:
        """[M,D] -> [T,D]: the sum of every token's rows, zero where it has none. The adjoint of `gather`."""
        return _Combine.apply(rows, self)


class _Gather(Function):
    """index_select whose backward sums in fp32 and in a fixed order; torch's own backward adds atomically."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, grouping: Grouping) -> Tensor:
        ctx.save_for_backward(*grouping)
        return tokens.index_select(0, grouping.token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Grouping(*ctx.saved_tensors).combine(grad), None


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, grouping: Grouping) -> Tensor:
        ctx.save_for_backward(*grouping)
        if run_on(rows):
            from moe.kernels.experts import combine

            return combine(grouping.bag_rows, grouping.bag_starts, rows)
        return F.embedding_bag(grouping.bag_rows, rows, grouping.bag_starts, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Grouping(*ctx.saved_tensors).gather(grad), None
