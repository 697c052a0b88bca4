"""Dispatchers send tokens to the ranks that hold their experts, and bring the results back.

Rank r of ep_size holds the experts [r * E / ep_size, (r + 1) * E / ep_size). Every rank reaches every
collective, forward and backward, even if it has no tokens and receives none.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from moe.experts import Experts
from moe.grouping import Grouping

# T tokens of this rank, H hidden, K experts per token, R = ep_size ranks
# N rows sent, N' rows received, C slots per row

# rows [N,...], rows to each rank, rows from each rank -> [N',...], and the work to wait for before reading it
Swap = Callable[[Tensor, list[int], list[int]], tuple[Tensor, dist.Work | None]]


class _Counts(NamedTuple):
    send: list[int]  # rows to each rank
    receive: list[int]  # rows from each rank
    num_slots: int  # slots that this rank computes


class Dispatcher(Protocol):
    """x [T,H], routing_weights [T,K], expert_indices [T,K] (global) -> [T,H], by the experts of all ranks.

    `drops`: the id E may occur; a slot with this id is not sent and adds nothing.
    """

    bytes_sent: int  # payload that forward passes sent to other ranks so far
    slots_routed: int  # (token, expert) pairs of this rank's tokens so far
    slots_received: int  # slots of this rank's and other ranks' tokens that this rank computed so far

    def __call__(
        self, x: Tensor, routing_weights: Tensor, expert_indices: Tensor, experts: Experts, drops: bool
    ) -> Tensor: ...


class LocalDispatcher:
    """All experts are on this rank. This is the oracle of the other dispatchers."""

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

    The tokens are split into `chunks` chunks. The experts compute one chunk while later chunks are being sent
    to them and earlier ones back, in forward and backward. `all_to_all` works as dist.all_to_all_single.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        all_to_all: Callable[..., Any] = dist.all_to_all_single,
        chunks: int = 1,
    ) -> None:
        self.bytes_sent = self.slots_routed = self.slots_received = 0
        self.ep_size = dist.get_world_size(group)
        self._ep_rank = dist.get_rank(group)
        self._group = group
        self._all_to_all = all_to_all
        self._chunks = chunks

    def __call__(
        self, x: Tensor, routing_weights: Tensor, expert_indices: Tensor, experts: Experts, drops: bool
    ) -> Tensor:
        absent = experts.num_local_experts
        ranks = expert_indices // absent  # [T,K] where each slot's expert lives, or R
        destinations = self._destinations(ranks)  # [T,columns], ep_size = no row
        tensors = (x, routing_weights, ranks, expert_indices % absent, destinations)
        chunks = list(zip(*(tensor.tensor_split(self._chunks) for tensor in tensors), strict=True))
        counts = self._exchange_counts([(destinations, ranks) for _, _, ranks, _, destinations in chunks])

        there = []
        for n, (tokens, weights, ranks, local_ids, destinations) in enumerate(chunks):
            # `Grouping.by` calls the function before `n` changes
            grouping = Grouping.by(destinations, self.ep_size, lambda: sum(counts()[n].send))  # noqa: B023
            weights, ids = self._pack(grouping, ranks, weights, local_ids, absent)
            exchange = _Exchange(self._swap, counts()[n].send, counts()[n].receive)
            (ids,) = exchange.start(ids.int())  # [N',C]
            there.append((grouping, exchange, ids, exchange.begin(grouping.gather(tokens), weights)))
        back = []
        for n, (grouping, exchange, ids, arriving) in enumerate(there):
            rows, weights = exchange.end(*arriving)  # [N',H], [N',C]
            send, receive, num_slots = counts()[n]
            exchange = _Exchange(self._swap, receive, send)
            back.append((grouping, exchange, exchange.begin(experts(rows, weights, ids, num_rows=num_slots))))
            sent, returned = sum(send) - send[self._ep_rank], sum(receive) - receive[self._ep_rank]
            row_bytes = x.shape[1] * x.element_size()
            slot_bytes = ids.shape[1] * (weights.element_size() + ids.element_size())
            self.slots_received += num_slots
            self.bytes_sent += sent * (row_bytes + slot_bytes) + returned * row_bytes
        self.slots_routed += expert_indices.numel()
        y = [grouping.combine(*exchange.end(*rows)) for grouping, exchange, rows in back]
        return torch.cat(y) if len(y) > 1 else y[0]

    def _destinations(self, ranks: Tensor) -> Tensor:
        """ranks [T,K] -> [T,columns]: the destination ranks of each token's rows; ep_size = no row."""
        return ranks

    def _pack(
        self, grouping: Grouping, ranks: Tensor, routing_weights: Tensor, local_ids: Tensor, absent: int
    ) -> tuple[Tensor, Tensor]:
        """The routing weights and local ids of each row, both [N,C]; id `absent` = expert on another rank."""
        return routing_weights.reshape(-1, 1)[grouping.slot], local_ids.reshape(-1, 1)[grouping.slot]

    def _exchange_counts(self, chunks: list[tuple[Tensor, Tensor]]) -> Callable[[], list[_Counts]]:
        """Exchange the counts of each chunk's (destinations, ranks).

        The returned function waits for the device: call it late.
        """
        pairs = [torch.stack([_count(ids, self.ep_size) for ids in chunk]) for chunk in chunks]
        counts = torch.stack(pairs).permute(2, 0, 1).contiguous()  # [R, chunks, 2]
        received = torch.empty_like(counts)
        work = self._all_to_all(received, counts, group=self._group, async_op=self._chunks > 1)

        @cache
        def wait() -> list[_Counts]:
            if work is not None:
                work.wait()
            rows, both = counts[..., 0].T, received.permute(1, 2, 0)
            numbers = torch.cat([rows.unsqueeze(1), both], 1).tolist()  # [chunks, 3, R]
            return [_Counts(send, receive, sum(slots)) for send, receive, slots in numbers]

        return wait

    def _swap(self, rows: Tensor, send: list[int], receive: list[int]) -> tuple[Tensor, dist.Work | None]:
        # A thread of the backend can be the last holder of these tensors. Detach them: otherwise that thread
        # destroys the Python objects of their autograd graph, and gloo aborts at exit.
        rows, out = rows.detach().contiguous(), rows.new_empty(sum(receive), *rows.shape[1:])
        splits = {"output_split_sizes": receive, "input_split_sizes": send}
        work = self._all_to_all(out, rows, **splits, group=self._group, async_op=self._chunks > 1)
        return out.detach(), work


class DeduplicatedAllToAllDispatcher(AllToAllDispatcher):
    """One row per (token, destination rank): the token with all its weights and the ids for that rank.

    The destination rank sums over its experts; the token's rank adds at most ep_size partial sums per token.
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


class _Exchange:
    """One all-to-all of several tensors; in backward, `end` sends gradients and `begin` receives them."""

    def __init__(self, swap: Swap, send: list[int], receive: list[int]) -> None:
        self._swap, self._send, self._receive = swap, send, receive
        self._under_way: list[tuple[Tensor, dist.Work | None]] = []

    def begin(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Start the exchange. Pass the returned tensors to `end`, and do not read them before."""
        return _Begin.apply(self, *tensors)

    def end(self, *arriving: Tensor) -> tuple[Tensor, ...]:
        """Wait for the exchange and return what has arrived; `arriving` is the result of `begin`."""
        return _End.apply(self, *arriving)

    def start(self, *tensors: Tensor, back: bool = False) -> tuple[Tensor, ...]:
        """`begin` without gradients; `back` sends in the opposite direction."""
        splits = (self._receive, self._send) if back else (self._send, self._receive)
        started = [self._swap(tensor, *splits) for tensor in tensors]
        self._under_way += started
        return tuple(arriving for arriving, _ in started)

    def finish(self) -> tuple[Tensor, ...]:
        """Wait for every transfer that was started and return what has arrived."""
        arrived, self._under_way = self._under_way, []
        for _, work in arrived:
            if work is not None:
                work.wait()
        return tuple(tensor for tensor, _ in arrived)


class _Begin(Function):
    """One autograd node for all tensors, so that every rank runs backward collectives in the same order."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return exchange.start(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.exchange.finish()


class _End(Function):
    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, *arriving: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        exchange.finish()
        return tuple(tensor.view_as(tensor) for tensor in arriving)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange.start(*grads, back=True)
        return None, *grads  # only for autograd's shape check: `_Begin` returns the exchanged gradients


def _count(ids: Tensor, num_ids: int) -> Tensor:
    """How often 0 ... num_ids - 1 occur, [num_ids] int64. torch.bincount would wait for a CUDA device."""
    flat = ids.flatten()
    return flat.new_zeros(num_ids + 1).scatter_add_(0, flat, torch.ones_like(flat))[:num_ids]
