"""SwiGLU experts: the weighted sum of this rank's experts for every token.

`reference` is the slow obvious version and the oracle. `loop` and `grouped` run one autograd function with
different grouped matrix products. `megablocks` and `liger` are optional packages. `choose_backend` picks one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moe import experts_optional
from moe.config import ConfigError, ModelConfig
from moe.grouping import ExpertWeights, Grouping, Routes
from moe.kernels.support import run_on
from moe.recompute import call

# T tokens, K slots per token, E local experts, H hidden, I intermediate
# M rows: the slots whose expert is here, sorted by expert


# x [T,H] -> [T,H], the weighted sum of the experts that each token goes to
Backend = Callable[[Tensor, Routes, ExpertWeights], Tensor]


class Experts(nn.Module):
    """Experts down(silu(gate(x)) * up(x)); the weights have the names and shapes of transformers.

    They are uninitialised; `moe.init` or `moe.hf` fills them. With `recompute` the backward computes the
    experts again from their inputs. Raises ConfigError for an unknown `backend` (a name of BACKENDS).
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        backend: str,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ConfigError([f"experts.backend={backend} is unknown; use one of {', '.join(BACKENDS)}"])
        self.num_local_experts = num_experts  # not read from the weights: ZeRO-3 empties them between uses
        self.backend, self.recompute = backend, recompute
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(
        self, x: Tensor, routing_weights: Tensor, expert_indices: Tensor, num_rows: int | None = None
    ) -> Tensor:
        """x [T,H], routing_weights [T,K], expert_indices [T,K] (local) -> [T,H].

        The id num_local_experts means that this rank does not have the expert; such a slot adds nothing.
        `num_rows` is the number of all other slots; None counts them, which waits for a CUDA device.
        """
        routes = Routes(routing_weights, expert_indices, num_rows)
        backends = RECOMPUTED if self.recompute else BACKENDS
        return backends[self.backend](x, routes, ExpertWeights(self.gate_up_proj, self.down_proj))


def supports(backend: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run on `device` in `dtype`; None if it can."""
    kind = torch.device(device).type
    if backend not in BACKENDS:
        return f"experts.backend={backend} is unknown; use one of {', '.join(BACKENDS)}"
    if backend == "grouped" and dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"experts.backend=grouped has no {dtype} kernel; use loop or reference"
    if backend == "grouped" and kind not in ("cpu", "cuda"):
        return f"experts.backend=grouped has no kernel on {kind}; use loop or reference"
    if backend in ("megablocks", "liger"):
        return experts_optional.obstacle(backend, kind, dtype)
    return None


def choose_backend(
    wanted: str, device: torch.device, dtype: torch.dtype, model: ModelConfig, deterministic: bool = False
) -> tuple[str, str | None]:
    """The name in BACKENDS that `wanted` stands for here, and why it is slow, if it is known to be.

    "auto" is grouped on GPUs for which torch has grouped kernels; on other GPUs liger, if it is installed and
    `deterministic` is false; else loop. Raises ConfigError for a backend that cannot run here.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    slow = None if capability is None else _no_grouped(capability, dtype, model, deterministic)
    backend = wanted
    if wanted == "auto" and capability is not None and slow is None:
        backend = "grouped"
    elif wanted == "auto":
        liger = capability is not None and not deterministic and supports("liger", device, dtype) is None
        backend = "liger" if liger else "loop"
    if (why_not := supports(backend, device, dtype)) is not None:
        raise ConfigError([why_not])
    if backend == "loop" and capability is not None:
        what = "experts.backend=loop is about ten times slower on a GPU than grouped products"
        return backend, f"{what}: {slow}" if slow else f"{what}; use experts.backend=auto"
    if backend == "grouped" and slow is not None:
        return backend, f"experts.backend=grouped waits for the GPU at every product here: {slow}"
    return backend, None


def _no_grouped(
    capability: tuple[int, int], dtype: torch.dtype, model: ModelConfig, deterministic: bool
) -> str | None:
    """Why torch has no grouped kernel on a GPU of this compute capability, and a remedy; None if it has."""
    if unaligned := model.unaligned_keys(dtype.itemsize):
        sizes = ", ".join(f"model.{key}={getattr(model, key)}" for key in unaligned)
        return f"their rows must be a multiple of 16 bytes, not {sizes}; round up to a multiple of 8"
    if dtype != torch.bfloat16:
        return f"torch has no grouped kernel in {dtype}; use dtype=bf16"
    if capability[0] not in (9, 10):  # Hopper and data-center Blackwell
        missing = experts_optional.obstacle("liger", "cuda", dtype)
        remedy = "use experts.backend=liger" if missing is None else missing
        remedy = "nothing faster is deterministic here" if deterministic else remedy
        return f"torch has no grouped kernel for compute capability {capability[0]}.{capability[1]}; {remedy}"
    return None


def _reference(x: Tensor, routes: Routes, weights: ExpertWeights) -> Tensor:
    """Every expert on every token, with weight zero if it was not selected."""
    y = torch.zeros_like(x)
    for expert, (gate_up, down) in enumerate(zip(*weights, strict=True)):
        gate, up = gate_up.chunk(2)
        weight = (routes.weights * (routes.experts == expert)).sum(-1, keepdim=True)  # [T,1]
        y = y + weight * F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    return y


class _Products(NamedTuple):
    """The two matrix products over sorted rows; `ends` [E] int32 is one past the last row of each expert."""

    project: Callable[[Tensor, Tensor, Tensor], Tensor]  # rows [M,A], weights [E,A,B], ends -> [M,B]
    outer: Callable[[Tensor, Tensor, Tensor], Tensor]  # a [M,A], b [M,B], ends -> [E,A,B], a_e^T b_e


def _loop_project(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    if len(rows) < _unit(0) * len(weights) and rows.dtype == torch.float32:
        return _grouped_project(rows, weights, ends)  # decoding: rounding would multiply the work
    out = rows.new_empty(len(rows), weights.shape[2])
    start = 0
    for weight, end in zip(weights.unbind(), ends.tolist(), strict=True):
        last = end + (start - end) % _unit(end - start)  # a slice ends with the last row
        torch.mm(rows[start:last], weight, out=out[start:last])  # later experts write their rows again
        start = end
    return out


def _loop_outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    out = a.new_empty(len(ends), a.shape[1], b.shape[1])
    start = 0
    for product, end in zip(out.unbind(), ends.tolist(), strict=True):
        middle = end - (end - start) % _unit(end - start)
        torch.mm(a[start:middle].t(), b[start:middle], out=product)  # zero for an expert without rows
        product.addmm_(a[middle:end].t(), b[middle:end])
        start = end
    return out


def _unit(count: int) -> int:
    """What the rows of a product are rounded to: oneDNN compiles each number of rows and keeps 1,024
    products, but an expert has another number in every step."""
    return max(16, (1 << count.bit_length()) >> 5)


def _grouped_project(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    if len(rows) == 0:  # the CUDA kernel does not accept empty operands
        return rows.new_empty(0, weights.shape[2])
    return F.grouped_mm(rows, weights, offs=ends)


def _grouped_outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    if len(a) == 0:
        return a.new_zeros(len(ends), a.shape[1], b.shape[1])
    out = F.grouped_mm(a.t(), b, offs=ends)
    if a.is_cuda and torch.cuda.get_device_capability(a.device) >= (10, 0):
        # Blackwell writes garbage for experts without rows (pytorch/pytorch#172439).
        out.masked_fill_((ends == F.pad(ends[:-1], (1, 0))).view(-1, 1, 1), 0)
    return out


class _SwiGLU(Function):
    """The experts as one autograd function. Of the rows, it saves only the pre-activations, 2 * M * I values;
    with `recompute` not even these.

    The routing weight multiplies the activation, before the down projection, so that its gradient needs no
    output rows; the input rows are gathered again in backward (both: SonicMoE, arXiv 2512.14080).
    """

    @staticmethod
    def forward(
        ctx: Any,
        products: _Products,
        recompute: bool,
        x: Tensor,
        routing_weights: Tensor,
        expert_indices: Tensor,
        num_rows: int | None,
        gate_up_weight: Tensor,
        down_weight: Tensor,
    ) -> Tensor:
        grouping = Grouping.by(expert_indices, len(down_weight), num_rows)
        gate_up = products.project(grouping.gather(x), gate_up_weight.mT, grouping.ends)  # [M,2I]
        hidden = _activation(gate_up)[0](gate_up, routing_weights, grouping.slot)  # [M,I]
        ctx.products = products
        kept = None if recompute else gate_up
        ctx.save_for_backward(x, routing_weights, gate_up_weight, down_weight, kept, *grouping)
        return grouping.combine(products.project(hidden, down_weight.mT, grouping.ends))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, routing_weights, gate_up_weight, down_weight, gate_up, *saved = ctx.saved_tensors
        grouping = Grouping(*saved)
        project, outer = ctx.products
        ends = grouping.ends
        if gate_up is None:
            gate_up = project(grouping.gather(x), gate_up_weight.mT, ends)

        grad_rows = grouping.gather(grad_y)  # [M,H]
        grad_hidden = project(grad_rows, down_weight, ends)  # [M,I]
        grad_gate_up, grad_weights, hidden = _activation(gate_up)[1](
            gate_up, routing_weights, grouping.slot, grad_hidden
        )
        grad_down = outer(grad_rows, hidden, ends)
        del grad_rows, grad_hidden, hidden

        grad_gate_up_weight = outer(grad_gate_up, grouping.gather(x), ends)
        grad_x = grouping.combine(project(grad_gate_up, gate_up_weight, ends))
        return None, None, grad_x, grad_weights, None, None, grad_gate_up_weight, grad_down


def _activation(x: Tensor) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]]:
    """The activation of the experts and its gradient, for tensors like `x`."""
    if run_on(x):
        from moe.kernels import experts

        return experts.activate, experts.activate_backward
    return _activate, _activate_backward


def _activate(gate_up: Tensor, weights: Tensor, slot: Tensor) -> Tensor:
    """silu(gate) * up * weight: gate_up [M,2I], weights [T,K], slot [M] of each row -> [M,I]."""
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate).mul_(up).mul_(weights.flatten()[slot].unsqueeze(1))


def _activate_backward(
    gate_up: Tensor, weights: Tensor, slot: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `_activate` by gate_up [M,2I] and weights [T,K], and its result [M,I].

    grad [M,I] is the gradient of the result; it is overwritten.
    """
    gate, up = gate_up.chunk(2, dim=1)
    weight = weights.flatten()[slot].unsqueeze(1)  # [M,1]
    silu = F.silu(gate)
    hidden = silu * up
    grad_weights = torch.zeros_like(weights).view(-1).index_copy_(0, slot, (grad * hidden).sum(1))
    grad.mul_(weight)
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=1)
    torch.mul(silu, grad, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
    return grad_gate_up, grad_weights.view_as(weights), hidden.mul_(weight)


def _fused(products: _Products, recompute: bool) -> Backend:
    return lambda x, routes, weights: _SwiGLU.apply(products, recompute, x, *routes, *weights)


_LOOP, _GROUPED = _Products(_loop_project, _loop_outer), _Products(_grouped_project, _grouped_outer)
BACKENDS: dict[str, Backend] = {
    "reference": _reference,
    "loop": _fused(_LOOP, recompute=False),
    "grouped": _fused(_GROUPED, recompute=False),
    "megablocks": experts_optional.megablocks,
    "liger": experts_optional.liger,
}
# the same, with pre-activations or all activations computed again in the backward
RECOMPUTED: dict[str, Backend] = {
    **{name: functools.partial(call, backend) for name, backend in BACKENDS.items()},
    "loop": _fused(_LOOP, recompute=True),
    "grouped": _fused(_GROUPED, recompute=True),
}
