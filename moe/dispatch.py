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
# N rows sent, N' rows received, C slots per row (K or 1)

# rows [N,...], rows to each rank, rows from each rank -> [N',...], and the work to wait for before reading it
Swap = Callable[[Tensor, list[int], list[int]], tuple[Tensor, dist.Work | None]]


# functions that pack (grouping, x, routing weights, ids) into rows and gradients of rows into gradients
Packing = tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]], Grouping]

# the integers that have the size of a floating dtype; bits are copied as integers, which changes no NaN
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    """One row per (token, slot): the token, one routing weight, one id, packed into one buffer.

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
        tensors = (x, routing_weights, expert_indices, ranks, destinations)
        chunks = list(zip(*(tensor.tensor_split(self._chunks) for tensor in tensors), strict=True))
        counts = self._exchange_counts([(destinations, ranks) for *_, ranks, destinations in chunks])

        there = []
        for n, (tokens, weights, ids, _, destinations) in enumerate(chunks):
            # `Grouping.by` calls the function before `n` changes
            grouping = Grouping.by(destinations, self.ep_size, lambda: sum(counts()[n].send))  # noqa: B023
            exchange = _Exchange(self._swap, counts()[n].send, counts()[n].receive)
            packing = (self._pack, self._unpack, grouping)
            there.append((grouping, exchange, _Begin.apply(exchange, packing, tokens, weights, ids)))
        back = []
        for n, (grouping, exchange, arriving) in enumerate(there):
            rows, weights, ids = _End.apply(exchange, x.shape[1], arriving)  # [N',H], [N',C], [N',C]
            send, receive, num_slots = counts()[n]
            ids = ids.view(_WORDS[ids.element_size()]) - self._ep_rank * absent
            ids = torch.where((ids >= 0) & (ids < absent), ids, absent)  # the others live on other ranks
            exchange = _Exchange(self._swap, receive, send)
            results = experts(rows, weights.contiguous(), ids, num_rows=num_slots)  # [N',H]
            back.append((grouping, exchange, _Begin.apply(exchange, None, results)))
            sent, returned = sum(send) - send[self._ep_rank], sum(receive) - receive[self._ep_rank]
            self.slots_received += num_slots
            self.bytes_sent += (sent * arriving.shape[1] + returned * x.shape[1]) * x.element_size()
        self.slots_routed += expert_indices.numel()
        y = [grouping.combine(*_End.apply(exchange, None, rows)) for grouping, exchange, rows in back]
        return torch.cat(y) if len(y) > 1 else y[0]

    def _destinations(self, ranks: Tensor) -> Tensor:
        """ranks [T,K] -> [T,columns]: the destination ranks of each token's rows; ep_size = no row."""
        return ranks

    @staticmethod
    def _pack(grouping: Grouping, x: Tensor, routing_weights: Tensor, ids: Tensor) -> Tensor:
        """The rows [N,H+2C] of the `grouping`: token, routing weights, and ids in the bits of its dtype."""
        words = _WORDS[x.element_size()]
        weights = routing_weights.view(words).reshape(-1, 1)[grouping.slot]
        ids = ids.to(words).reshape(-1, 1)[grouping.slot]
        return torch.cat((x.view(words)[grouping.token], weights, ids), 1).view(x.dtype)

    @staticmethod
    def _unpack(grouping: Grouping, grads: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The gradients [N,H+C] of packed rows, without ids -> those of x [T,H] and routing weights [T,K]."""
        grad_x = grouping.combine(grads)[:, :-1]
        grad_weights = grads.new_zeros(len(grad_x) * top_k).index_copy_(0, grouping.slot, grads[:, -1])
        return grad_x, grad_weights.view(-1, top_k)

    def _exchange_counts(self, chunks: list[tuple[Tensor, Tensor]]) -> Callable[[], list[_Counts]]:
        """Exchange the counts of each chunk's (destinations, ranks).

        The returned function waits until the host knows them: call it late. On CUDA it waits for their copy
        into pinned memory, not for what has been queued since.
        """
        pairs = [torch.stack([_count(ids, self.ep_size) for ids in chunk]) for chunk in chunks]
        counts = torch.stack(pairs).permute(2, 0, 1).contiguous()  # [R, chunks, 2]
        received = torch.empty_like(counts)
        work = self._all_to_all(received, counts, group=self._group, async_op=self._chunks > 1)

        def numbers() -> Tensor:
            if work is not None:
                work.wait()  # on CUDA only the stream waits
            rows, both = counts[..., 0].T, received.permute(1, 2, 0)
            return torch.cat([rows.unsqueeze(1), both], 1)  # [chunks, 3, R]

        if counts.is_cuda:
            pinned, copied = numbers().to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()

        @cache
        def wait() -> list[_Counts]:
            if counts.is_cuda:
                copied.synchronize()
            lists = (pinned if counts.is_cuda else numbers()).tolist()
            return [_Counts(send, receive, sum(slots)) for send, receive, slots in lists]

        return wait

    def _swap(self, rows: Tensor, send: list[int], receive: list[int]) -> tuple[Tensor, dist.Work | None]:
        # A thread of the backend can be the last holder of these tensors. Detach them: otherwise that thread
        # destroys the Python objects of their autograd graph, and gloo aborts at exit.
        rows, out = rows.detach().contiguous(), rows.new_empty(sum(receive), *rows.shape[1:])
        splits = {"output_split_sizes": receive, "input_split_sizes": send}
        work = self._all_to_all(out, rows, **splits, group=self._group, async_op=self._chunks > 1)
        return out.detach(), work


class DeduplicatedAllToAllDispatcher(AllToAllDispatcher):
    """One row per (token, destination rank): the token with all its weights and ids.

    The destination rank sums over its experts; the token's rank adds at most ep_size partial sums per token.
    """

    def _destinations(self, ranks: Tensor) -> Tensor:
        every_rank = torch.arange(self.ep_size, device=ranks.device)
        visited = torch.zeros(len(ranks), self.ep_size + 1, dtype=torch.bool, device=ranks.device)
        return torch.where(visited.scatter_(1, ranks, True)[:, :-1], every_rank, self.ep_size)

    @staticmethod
    def _pack(grouping: Grouping, x: Tensor, routing_weights: Tensor, ids: Tensor) -> Tensor:
        words = _WORDS[x.element_size()]
        packed = torch.cat((x.view(words), routing_weights.view(words), ids.to(words)), 1)
        return packed.index_select(0, grouping.token).view(x.dtype)

    @staticmethod
    def _unpack(grouping: Grouping, grads: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        grad_x, grad_weights = grouping.combine(grads).tensor_split((-top_k,), 1)
        return grad_x, grad_weights


class _Exchange:
    """One all-to-all of rows. In backward `_End` sends their gradients, `_Begin` receives them."""

    def __init__(self, swap: Swap, send: list[int], receive: list[int]) -> None:
        self._swap, self._send, self._receive = swap, send, receive
        self._under_way: tuple[Tensor, dist.Work | None] | None = None

    def start(self, rows: Tensor, back: bool = False) -> Tensor:
        """Start to send; do not read the result before `finish`. `back` sends in the opposite direction."""
        splits = (self._receive, self._send) if back else (self._send, self._receive)
        self._under_way = self._swap(rows, *splits)
        return self._under_way[0]

    def finish(self) -> Tensor:
        """Wait for the transfer that was started and return what has arrived."""
        assert self._under_way is not None, "nothing was started"
        (arrived, work), self._under_way = self._under_way, None
        if work is not None:
            work.wait()
        return arrived


class _Begin(Function):
    """Start an exchange: of packed rows [N,H+2C] from (x, routing weights, ids), or of rows as they are.

    One autograd node for all tensors, so that every rank runs backward collectives in the same order.
    """

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, packing: Packing | None, *tensors: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # the gradients arrive by the exchange
        ctx.exchange, ctx.unpack = exchange, None
        if packing is None:
            return exchange.start(tensors[0])
        pack, ctx.unpack, grouping = packing
        ctx.top_k = tensors[1].shape[1]
        ctx.save_for_backward(*grouping)
        return exchange.start(pack(grouping, *tensors))

    @staticmethod
    def backward(ctx: Any, _: None) -> tuple[Tensor | None, ...]:
        grads = ctx.exchange.finish()
        if ctx.unpack is None:
            return None, None, grads
        return None, None, *ctx.unpack(Grouping(*ctx.saved_tensors), grads, ctx.top_k), None


class _End(Function):
    """Wait for an exchange: rows [N',H+2C] -> tokens [N',width], weights and ids; `width` None: the rows.

    Nothing may compute with the ids before they are viewed as integers again. They have no gradient.
    """

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, width: int | None, arriving: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        rows = exchange.finish().detach()
        if width is None:
            return (rows,)
        tokens, weights, ids = rows.tensor_split((width, (width + rows.shape[1]) // 2), 1)
        ctx.mark_non_differentiable(ids)
        return tokens, weights, ids

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.exchange.start(grads[0] if len(grads) == 1 else torch.cat(grads[:2], 1), back=True)
        return None, None, None  # `_Begin` returns what this exchange brings


def _count(ids: Tensor, num_ids: int) -> Tensor:
    """How often 0 ... num_ids - 1 occur, [num_ids] int64. torch.bincount would wait for a CUDA device."""
    flat = ids.flatten()
    return flat.new_zeros(num_ids + 1).scatter_add_(0, flat, torch.ones_like(flat))[:num_ids]
