"""Sums of gradients where DeepSpeed would round the sums to bf16, or transfer more data than necessary.

Weights in bf16 have gradients in bf16, but their sums over micro-batches and ranks are fp32. ZeRO 2 and 3 can
be configured so (`trainer/engine/engine.py`). Without ZeRO and under ZeRO-1, DeepSpeed's optimizer object,
which holds the fp32 master weights, gets one of the classes below instead of its own.
"""

import math
from collections.abc import Callable
from typing import Any

import deepspeed.comm
import torch
import torch.distributed as dist
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn

from moe.sums import accumulate

SMALL = 2**20  # gradients with fewer elements share one collective
bf16_optimizer.see_memory_usage = lambda *_, **__: None  # it would print a table for each parameter group


class Fp32Sums(FP16_UnfusedOptimizer):
    """bf16 without ZeRO: the gradient of each master weight is the fp32 sum over micro-batches."""

    def take_over(self) -> dict[nn.Parameter, Tensor]:
        """From now on, add each gradient to that of its master as soon as the backward has computed it.

        Returns the master of each weight.
        """
        groups = zip(self.fp16_groups, self.fp32_groups, strict=True)
        masters = {weight: master for pair in groups for weight, master in zip(*pair, strict=True)}
        for weight, master in masters.items():
            weight.register_post_accumulate_grad_hook(_adding_to(master))
        return masters

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update the masters with their gradients (reduced and clipped before), and the weights from them."""
        self.optimizer.step()
        for weights, masters in zip(self.fp16_groups, self.fp32_groups, strict=True):
            torch._foreach_copy_(weights, masters)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the sums of gradients."""
        self.optimizer.zero_grad(set_to_none)


class ReduceScatter(BF16_Optimizer):
    """ZeRO-1 in bf16: each rank receives only the gradient sums of the elements that it updates, in fp32.

    DeepSpeed adds gradients up in a flat fp32 buffer for each parameter group, and would all-reduce the whole
    buffer in bf16. Here gradients are summed over ranks, not averaged.
    """

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Called by DeepSpeed after the last micro-batch. Every rank must call it."""
        parts = zip(
            self.fp32_groups_gradient_flat_partition,
            self.fp32_groups_gradients_flat,
            self.real_dp_process_group,
            strict=True,
        )
        for totals, written in zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True):
            for total, there in zip(totals, written, strict=True):
                if not there:  # it holds the sum of the last step
                    total.zero_()
        works = [
            deepspeed.comm.reduce_scatter_tensor(mine, whole, group=group, async_op=True)
            for mine, whole, group in parts
            if dist.get_world_size(group) > 1
        ]
        for work in works:
            work.wait()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Clip by the global norm and update. If the norm is not finite, nothing changes."""
        gradients = self.fp32_groups_gradient_flat_partition
        squares = square_sum(gradients, gradients[0].device)
        dist.all_reduce(squares)  # each element is updated by one rank only
        norm = self._global_grad_norm = float(squares.sqrt())
        self.overflow = not math.isfinite(norm)
        if self.overflow:
            return
        clip(self.optimizer, gradients, norm, self.clip_grad)
        for master, gradient in zip(self.fp32_groups_flat_partition, gradients, strict=True):
            master.grad = gradient
        self.optimizer.step()
        self.update_lp_params()

    def _update_hp_grad(self, lp: Any, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        """Called by DeepSpeed as soon as the backward has computed a gradient; DeepSpeed then frees it."""
        written = self.fp32_groups_has_gradients[group_idx]
        accumulate(self.fp32_groups_gradients[group_idx][param_idx], lp.grad, first=not written[param_idx])
        written[param_idx] = True

    def clear_hp_grads(self) -> None:
        """Called by DeepSpeed after a step: the next gradients are written over the sums."""
        for written in self.fp32_groups_has_gradients:
            written[:] = [False] * len(written)


def reduce_and_clip(
    shared: list[Tensor],
    experts: list[Tensor],
    edp_group: dist.ProcessGroup | None,
    ep_group: dist.ProcessGroup | None,
    optimizer: Any,
    max_norm: float,
) -> float:
    """Without ZeRO: sum gradients over the ranks that hold the same weights, in place; clip them.

    shared: gradients of weights that all ranks hold; experts: of weights that the ranks of `edp_group` hold;
    `ep_group` holds all experts once. Returns the global norm before clipping. Every rank must call it.
    """
    for gradients, group in ((shared, None), (experts, edp_group)):
        if dist.get_world_size(group) > 1:
            all_reduce(gradients, group)
    squares = torch.stack([square_sum(gradients, shared[0].device) for gradients in (shared, experts)])
    dist.all_reduce(squares[1], group=ep_group)
    norm = float(squares.sum().sqrt())
    clip(optimizer, shared + experts, norm, max_norm)
    return norm


def all_reduce(gradients: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum gradients over the ranks of `group` in place; all small ones share one collective."""
    large = [gradient for gradient in gradients if gradient.numel() >= SMALL]
    small = [gradient for gradient in gradients if gradient.numel() < SMALL]
    for gradient in large:
        deepspeed.comm.all_reduce(gradient, group=group)
    if small:
        together = torch.cat([gradient.flatten() for gradient in small])
        deepspeed.comm.all_reduce(together, group=group)
        parts = together.split([gradient.numel() for gradient in small])
        torch._foreach_copy_(small, [part.view_as(to) for part, to in zip(parts, small, strict=True)])


def square_sum(tensors: list[Tensor], device: torch.device) -> Tensor:
    """The sum of the squares of all elements, a scalar in fp32 on `device`."""
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(tensors, dtype=torch.float32)).square().sum()


def clip(optimizer: Any, gradients: list[Tensor], norm: float, max_norm: float) -> None:
    """Scale gradients with this global norm down to `max_norm`; `max_norm` 0 turns this off.

    A fused optimizer of torch does it in its next step, as it reads them; for others it is done here.
    """
    scale = max(1.0, (norm + 1e-6) / max_norm) if max_norm > 0 else 1.0
    fused = optimizer.defaults.get("fused")
    optimizer.grad_scale = torch.full((), scale, device=gradients[0].device) if fused and scale > 1 else None
    if scale > 1 and not fused:
        torch._foreach_mul_(gradients, 1 / scale)


def _adding_to(master: Any) -> Callable[[nn.Parameter], None]:
    @torch.no_grad()
    def add(weight: Any) -> None:
        first = master.grad is None
        if first:
            master.grad = torch.empty_like(master)
        accumulate(master.grad, weight.grad, first)
        weight.grad = None

    return add
