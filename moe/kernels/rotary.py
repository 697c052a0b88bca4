"""QK-norm and rotary positions of all heads as one pass over memory, forward and backward."""
# T tokens, N heads, C head_dim, R <= C values that are rotated

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_VALUES = 1024  # what one program computes at a time, in whole heads
_STEPS = 16  # how often a program of the backward does so: it leaves one partial sum for the weight


def normalize_and_rotate(
    x: Tensor, weight: Tensor, tables: tuple[Tensor, Tensor], eps: float, center: float
) -> Tensor:
    """RMSNorm over C times `center + weight`, then rotation: x [T,N,C], weight [C] -> [T,N,C], contiguous.

    tables: cosines and sines [T,1,R/2]. x may be strided. Computed in fp32 and rounded once; the gradient of
    the weight is summed in a fixed order. Its oracle is the rest of `moe.attention.HeadNorm.forward`.
    """
    return _Function.apply(x, weight, *tables, eps, center)


class _Function(Function):
    """Keeps its inputs and no result for the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, center: float
    ) -> Tensor:
        x, cos, sin = _dense_heads(x), cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.numbers = eps, center
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rows, sizes, blocks = _sizes(x, cos)
        if rows:
            strides = x.stride(0), x.stride(1)
            grid = (triton.cdiv(rows, blocks["ROWS"]),)
            _normalize_and_rotate[grid](x, weight, cos, sin, out, *strides, *sizes, eps, center, **blocks)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        grad = _dense_heads(grad)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rows, sizes, blocks = _sizes(x, cos)
        programs = triton.cdiv(rows, blocks["ROWS"] * _STEPS)
        partial = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
        if rows:
            tensors = (x, weight, cos, sin, grad, grad_x, partial)
            strides = x.stride(0), x.stride(1), grad.stride(0), grad.stride(1)
            _normalize_and_rotate_backward[(programs,)](
                *tensors, *strides, *sizes, *ctx.numbers, STEPS=_STEPS, **blocks
            )
        return grad_x, partial.sum(0).to(weight.dtype), None, None, None, None


def _dense_heads(x: Tensor) -> Tensor:
    """x, copied only if the values of a head are not side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(x: Tensor, cos: Tensor) -> tuple[int, tuple[int, int, int, int], dict[str, int]]:
    """T*N; T*N, N, R/2 and C as the kernels take them; and the sizes of their blocks."""
    tokens, heads, width = x.shape
    half = cos.shape[-1]
    rest = width - 2 * half
    blocks = {"HALF": triton.next_power_of_2(half), "REST": triton.next_power_of_2(rest) if rest else 0}
    blocks["ROWS"] = max(_VALUES // triton.next_power_of_2(width), 1)
    return tokens * heads, (tokens * heads, heads, half, width), blocks


@triton.jit
def _normalize_and_rotate(
    x,
    weight,
    cos,
    sin,
    out,
    token_stride,
    head_stride,
    rows,
    heads,
    half,
    width,
    eps,
    center,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    token = (row // heads).to(tl.int64)
    source = x + token * token_stride + (row % heads).to(tl.int64) * head_stride
    target = out + row.to(tl.int64) * width
    column = tl.arange(0, HALF)[None, :]
    here = (row < rows) & (column < half)
    x1 = tl.load(source + column, mask=here, other=0.0).to(tl.float32)
    x2 = tl.load(source + half + column, mask=here, other=0.0).to(tl.float32)
    squares = tl.sum(x1 * x1 + x2 * x2, 1)[:, None]
    if REST:
        last = 2 * half + tl.arange(0, REST)[None, :]
        there = (row < rows) & (last < width)
        x3 = tl.load(source + last, mask=there, other=0.0).to(tl.float32)
        squares += tl.sum(x3 * x3, 1)[:, None]
    scale = tl.rsqrt(squares / width + eps)
    n1 = x1 * scale * (center + tl.load(weight + column, mask=column < half, other=0.0).to(tl.float32))
    n2 = x2 * scale * (center + tl.load(weight + half + column, mask=column < half, other=0.0).to(tl.float32))
    c = tl.load(cos + token * half + column, mask=here, other=0.0).to(tl.float32)
    s = tl.load(sin + token * half + column, mask=here, other=0.0).to(tl.float32)
    tl.store(target + column, n1 * c - n2 * s, mask=here)
    tl.store(target + half + column, n2 * c + n1 * s, mask=here)
    if REST:
        w3 = center + tl.load(weight + last, mask=last < width, other=0.0).to(tl.float32)
        tl.store(target + last, x3 * scale * w3, mask=there)


@triton.jit
def _normalize_and_rotate_backward(
    x,
    weight,
    cos,
    sin,
    grad,
    grad_x,
    partial,
    token_stride,
    head_stride,
    grad_token_stride,
    grad_head_stride,
    rows,
    heads,
    half,
    width,
    eps,
    center,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    column = tl.arange(0, HALF)[None, :]
    w1 = center + tl.load(weight + column, mask=column < half, other=0.0).to(tl.float32)
    w2 = center + tl.load(weight + half + column, mask=column < half, other=0.0).to(tl.float32)
    sum1 = tl.zeros([ROWS, HALF], dtype=tl.float32)
    sum2 = tl.zeros([ROWS, HALF], dtype=tl.float32)
    if REST:
        last = 2 * half + tl.arange(0, REST)[None, :]
        w3 = center + tl.load(weight + last, mask=last < width, other=0.0).to(tl.float32)
        sum3 = tl.zeros([ROWS, REST], dtype=tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]
        token = (row // heads).to(tl.int64)
        head = (row % heads).to(tl.int64)
        source = x + token * token_stride + head * head_stride
        incoming = grad + token * grad_token_stride + head * grad_head_stride
        target = grad_x + row.to(tl.int64) * width
        here = (row < rows) & (column < half)
        x1 = tl.load(source + column, mask=here, other=0.0).to(tl.float32)
        x2 = tl.load(source + half + column, mask=here, other=0.0).to(tl.float32)
        g1 = tl.load(incoming + column, mask=here, other=0.0).to(tl.float32)
        g2 = tl.load(incoming + half + column, mask=here, other=0.0).to(tl.float32)
        c = tl.load(cos + token * half + column, mask=here, other=0.0).to(tl.float32)
        s = tl.load(sin + token * half + column, mask=here, other=0.0).to(tl.float32)
        d1 = g1 * c + g2 * s  # the rotation undone
        d2 = g2 * c - g1 * s
        squares = tl.sum(x1 * x1 + x2 * x2, 1)[:, None]
        dots = tl.sum(d1 * w1 * x1 + d2 * w2 * x2, 1)[:, None]
        if REST:
            there = (row < rows) & (last < width)
            x3 = tl.load(source + last, mask=there, other=0.0).to(tl.float32)
            d3 = tl.load(incoming + last, mask=there, other=0.0).to(tl.float32)
            squares += tl.sum(x3 * x3, 1)[:, None]
            dots += tl.sum(d3 * w3 * x3, 1)[:, None]
        scale = tl.rsqrt(squares / width + eps)
        along = dots * scale * scale * scale / width
        tl.store(target + column, d1 * w1 * scale - x1 * along, mask=here)
        tl.store(target + half + column, d2 * w2 * scale - x2 * along, mask=here)
        sum1 += d1 * x1 * scale
        sum2 += d2 * x2 * scale
        if REST:
            tl.store(target + last, d3 * w3 * scale - x3 * along, mask=there)
            sum3 += d3 * x3 * scale
    sums = partial + tl.program_id(0).to(tl.int64) * width
    tl.store(sums + column, tl.sum(sum1, 0)[None, :], mask=column < half)
    tl.store(sums + half + column, tl.sum(sum2, 0)[None, :], mask=column < half)
    if REST:
        tl.store(sums + last, tl.sum(sum3, 0)[None, :], mask=last < width)
