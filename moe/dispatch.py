"""Dispatchers bring tokens to the ranks that hold their experts, and the results back.

Rank r of ep_size holds the experts [r * E / ep_size, (r + 1) * E / ep_size). Every rank reaches every
collective, forward and backward, whether or not it owns or receives tokens.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from moe.experts import Experts
from moe.grouping import Grouping

# T tokens of this rank, H hidden, K experts per token, R = ep_size ranks
# N rows sent, N' rows received, C slots per row

# rows [N,...], rows to each rank, rows from each rank -> [N',...]
Swap = Callable[[Tensor, list[int], list[int]], Tensor]


class Dispatcher(Protocol):
    """x [T,H], routing_weights [T,K], expert_indices [T,K] (global) -> [T,H], by the experts of all ranks.

    `drops`: the id E may occur; its slot goes nowhere and adds nothing.
    """

    bytes_sent: int  # payload that forward passes sent to other ranks so far
    slots_routed: int  # (token, expert) pairs of this rank's tokens so far
    slots_received: int  # of those, and of other ranks', that were computed here so far

    def __call__(
        self, x: Tensor, routing_weights: Tensor, expert_indices: Tensor, experts: Experts, drops: bool
    ) -> Tensor: ...


class LocalDispatcher:
    """All experts are here. The oracle of the others."""

    bytes_sent = slots_routed = slots_received = 0

    def __call__(
        self, x: Tensor, routing_weights: Tensor, expert_indices: Tensor, experts: Experts, drops: bool
    ) -> Tensor:
        num_rows = expert_indices.numel()
        self.slots_routed += num_rows
        if drops:  # counting waits for the device
            num_rows = int((expert_indices < experts.num_local_experts).sum())
        self.slots_received += num_rows
        return experts(x, routing_weights, expert_indices, num_rows=num_rows)


class AllToAllDispatcher:
    """One row per (token, slot): the token, one routing weight, one local id.

    `all_to_all` has the signature of torch.distributed.all_to_all_single.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, all_to_all: Callable[..., Any] = dist.all_to_all_single
    ) -> None:
        self.bytes_sent = self.slots_routed = self.slots_received = 0
        self.ep_size = dist.get_world_size(group)
        self._ep_rank = dist.get_rank(group)
        self._group = group
        self._all_to_all = all_to_all

    def __call__(
        self, x: Tensor, routing_weights: Tensor, expert_indices: Tensor, experts: Experts, drops: bool
    ) -> Tensor:
        ranks = expert_indices // experts.num_local_experts  # [T,K] where each slot's expert lives, or R
        local_ids = expert_indices % experts.num_local_experts
        destinations = self._destinations(ranks)  # [T,columns], ep_size = no row
        send, receive, num_slots = self._exchange_counts(destinations, ranks)
        grouping = Grouping.by(destinations, self.ep_size, num_rows=sum(send))
        weights, ids = self._pack(grouping, ranks, routing_weights, local_ids, experts.num_local_experts)

        ids = self._swap(ids.int(), send, receive)  # [N',C]
        rows, weights = self._exchange(send, receive, grouping.gather(x), weights)  # [N',H], [N',C]
        (rows,) = self._exchange(receive, send, experts(rows, weights, ids, num_rows=num_slots))  # [N,H]
        sent, returned = sum(send) - send[self._ep_rank], sum(receive) - receive[self._ep_rank]
        row_bytes = x.shape[1] * x.element_size()
        slot_bytes = ids.shape[1] * (weights.element_size() + ids.element_size())
        self.slots_routed += expert_indices.numel()
        self.slots_received += num_slots
        self.bytes_sent += sent * (row_bytes + slot_bytes) + returned * row_bytes
        return grouping.combine(rows)

    def _destinations(self, ranks: Tensor) -> Tensor:
        """ranks [T,K] -> the rank of each row that a token is sent in, ep_size where there is none."""
        return ranks

    def _pack(
        self, grouping: Grouping, ranks: Tensor, routing_weights: Tensor, local_ids: Tensor, absent: int
    ) -> tuple[Tensor, Tensor]:
        """The routing weights and local ids of each row, both [N,C]; id `absent` = on another rank."""
        return routing_weights.reshape(-1, 1)[grouping.slot], local_ids.reshape(-1, 1)[grouping.slot]

    def _exchange_counts(self, destinations: Tensor, ranks: Tensor) -> tuple[list[int], list[int], int]:
        """Rows to each rank, rows from each rank, slots received; waits for the device."""
        counts = torch.stack([_count(destinations, self.ep_size), _count(ranks, self.ep_size)], 1)  # [R,2]
        received = torch.empty_like(counts)
        self._all_to_all(received, counts, group=self._group)
        send, receive, slots = torch.stack([counts[:, 0], *received.unbind(1)]).tolist()
        return send, receive, sum(slots)

    def _exchange(self, send: list[int], receive: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        return _Exchange.apply(self._swap, send, receive, *tensors)

    def _swap(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        # A thread of the backend can be the last to hold these tensors. Detached, they take no autograd graph
        # with them, whose Python objects that thread would have to destroy (gloo then aborts at exit).
        rows, out = rows.detach().contiguous(), rows.new_empty(sum(receive), *rows.shape[1:])
        splits = {"output_split_sizes": receive, "input_split_sizes": send}
        self._all_to_all(out, rows, **splits, group=self._group)
        return out.detach()


class DeduplicatedAllToAllDispatcher(AllToAllDispatcher):
    """One row per (token, destination rank): the token with all its weights and the ids for that rank.

    The expert side sums the experts it holds; this side adds up to ep_size partial sums per token.
    """

    def _destinations(self, ranks: Tensor) -> Tensor:
        every_rank = torch.arange(self.ep_size, device=ranks.device)
        visited = torch.zeros(len(ranks), self.ep_size + 1, dtype=torch.bool, device=ranks.device)
        return torch.where(visited.scatter_(1, ranks, True)[:, :-1], every_rank, self.ep_size)

    def _pack(
        self, grouping: Grouping, ranks: Tensor, routing_weights: Tensor, local_ids: Tensor, absent: int
    ) -> tuple[Tensor, Tensor]:
        destination = (grouping.slot % self.ep_size).unsqueeze(1)  # [N,1]
        ids = torch.where(ranks[grouping.token] == destination, local_ids[grouping.token], absent)
        return routing_weights[grouping.token], ids


class _Exchange(Function):
    """All-to-all of several tensors as one node, so that backward meets the other ranks in one order."""

    @staticmethod
    def forward(
        ctx: Any, swap: Swap, send: list[int], receive: list[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.swap, ctx.send, ctx.receive = swap, send, receive
        return tuple(swap(tensor, send, receive) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(ctx.swap(grad, ctx.receive, ctx.send) for grad in grads)


def _count(ids: Tensor, num_ids: int) -> Tensor:
    """How often 0 ... num_ids - 1 occur, [num_ids] int64. torch.bincount would wait for a CUDA device."""
    flat = ids.flatten()
    return flat.new_zeros(num_ids + 1).scatter_add_(0, flat, torch.ones_like(flat))[:num_ids]
