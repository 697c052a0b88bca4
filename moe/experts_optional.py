"""Expert compute by megablocks 0.10 and by liger-kernel 0.8, both optional and imported at first use.

Both are Triton kernels: they need a CUDA device, or TRITON_INTERPRET=1, which runs them slowly on any device.
"""

import functools
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.grouping import ExpertWeights, Grouping, Routes

# T tokens, K slots per token, E local experts, H hidden, I intermediate
# M slots whose expert is here

_REQUIREMENTS: dict[str, tuple[tuple[str, ...], str]] = {  # backend: packages, remedy
    "megablocks": (("megablocks", "stk", "triton"), "run `make megablocks`"),
    "liger": (("liger_kernel", "triton"), "run `.venv/bin/python -m pip install liger-kernel==0.8.5`"),
}


def obstacle(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why "megablocks" or "liger" cannot run on `device_type` in `dtype`, and the remedy; None if it can."""
    key = f"experts.backend={backend}"
    packages, remedy = _REQUIREMENTS[backend]
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        return f"{key} needs {', '.join(missing)}, not installed here; {remedy}"
    if device_type != "cuda" and not _interpreted():
        return f"{key} runs Triton kernels, which need a CUDA device, not {device_type}; use loop or grouped"
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    if backend == "megablocks" and find_spec("grouped_gemm"):
        dtypes = [torch.bfloat16]  # the only dtype of grouped_gemm
    if backend == "liger":  # its fp32 products on a GPU are TF32; the interpreter has no bf16 atomics
        dtypes = [torch.float32] if _interpreted() else [torch.bfloat16, torch.float16]
    if dtype not in dtypes:
        return f"{key} has no {dtype} kernel here, only {', '.join(map(str, dtypes))}; use loop or reference"
    return None


def _present_slots(
    compute: Callable[[Tensor, Routes, ExpertWeights], Tensor],
) -> Callable[[Tensor, Routes, ExpertWeights], Tensor]:
    """Make a backend from `compute`, which needs the experts of all slots on this rank.

    If some are on other ranks, each of the M slots whose expert is here becomes a token with a single slot.
    """

    def backend(x: Tensor, routes: Routes, weights: ExpertWeights) -> Tensor:
        absent, num_rows = routes.experts == len(weights.down), routes.num_rows  # [T,K]
        if num_rows is None:
            num_rows = absent.numel() - int(absent.sum())
        if num_rows == absent.numel():
            return compute(x, routes, weights)
        here = Grouping.by(absent.long(), 1, num_rows)
        mixing = routes.weights.flatten()[here.slot].unsqueeze(1)  # [M,1]
        ids = routes.experts.flatten()[here.slot].unsqueeze(1)  # [M,1]
        return here.combine(compute(here.gather(x), Routes(mixing, ids, num_rows), weights))

    return backend


@_present_slots
def megablocks(x: Tensor, routes: Routes, weights: ExpertWeights) -> Tensor:
    """The grouped path of megablocks' dropless layer (`ParallelDroplessMLP` with `GroupedGLU`)."""
    ops, grouped_gemm = _load_megablocks()
    num_experts, top_k = len(weights.down), routes.experts.shape[1]
    ids = routes.experts.flatten().int()  # [T*K]
    sorted_ids, order = ops.sort(ids, num_experts.bit_length())
    counts = ops.histogram(ids, num_experts)  # [E]
    ends = ops.inclusive_cumsum(counts, 0).view(num_experts)
    rows = ops.gather(x.contiguous(), order, sorted_ids, ends, top_k)  # [T*K,H]
    counts = counts.cpu().long()  # grouped_gemm reads them on the host
    # GroupedGLU takes w2 as [E,I,H]; that copy would live until backward, and ZeRO-3 could not free it.
    product = functools.partial(grouped_gemm.gmm, batch_sizes=counts, trans_b=True)
    gate, up = product(rows, weights.gate_up).chunk(2, dim=1)  # [T*K,I]
    hidden = F.silu(gate) * up
    y = product(hidden, weights.down)  # [T*K,H]
    return ops.scatter(y, order, sorted_ids, routes.weights.flatten(), ends, top_k)


@_present_slots
def liger(x: Tensor, routes: Routes, weights: ExpertWeights) -> Tensor:
    """liger-kernel's LigerFusedMoEFunction."""
    return _load_liger().apply(
        x.contiguous(), weights.gate_up, weights.down, routes.experts.int(), routes.weights
    )


@functools.cache
def _load_megablocks() -> tuple[ModuleType, Any]:
    """megablocks.ops and grouped_gemm.ops; torch code replaces their CUDA extensions if not installed."""
    stand_ins: dict[str, Any] = {
        "megablocks_ops": {"sort": _sort, "histogram": _histogram, "inclusive_cumsum": _inclusive_cumsum},
        "grouped_gemm": {"ops": SimpleNamespace(gmm=_gmm), "backend": None},
    }
    missing = {name: members for name, members in stand_ins.items() if find_spec(name) is None}
    for name, members in missing.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(members)
    try:
        from megablocks import grouped_gemm_util, ops
        from megablocks.backend import kernels
    finally:  # no other code may mistake the stand-ins for the real modules
        for name in missing:
            del sys.modules[name]
    _fix_configurations(kernels)
    return ops, grouped_gemm_util.ops


@functools.cache
def _load_liger() -> Any:
    from liger_kernel.ops import fused_moe, fused_moe_kernels

    _fix_configurations(fused_moe_kernels)
    return fused_moe.LigerFusedMoEFunction


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _fix_configurations(kernels: ModuleType) -> None:
    """Keep one configuration per kernel under Triton's interpreter, which has no device to time more on."""
    for kernel in vars(kernels).values():
        if _interpreted():
            del getattr(kernel, "configs", [])[1:]


def _sort(keys: Tensor, end_bit: int, sorted_keys: Tensor, order: Tensor) -> None:
    values, indices = keys.sort(stable=True)
    sorted_keys.copy_(values)
    order.copy_(indices)


def _histogram(ids: Tensor, num_bins: int) -> Tensor:
    return torch.bincount(ids, minlength=num_bins).int()


def _inclusive_cumsum(counts: Tensor, dim: int, out: Tensor) -> None:
    torch.cumsum(counts, dim, out=out)


def _gmm(rows: Tensor, weights: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """A loop, as in grouped_gemm itself on Hopper, so that it runs on every device and in every dtype."""
    groups = zip(rows.split(batch_sizes.tolist()), (weights.mT if trans_b else weights).unbind(), strict=True)
    return torch.cat([group @ weight for group, weight in groups])
