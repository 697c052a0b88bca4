"""The passes of the experts over memory besides their matrix products: activation, its gradient, combine."""
# M rows, I intermediate, T tokens, K slots per token, D width of a row

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 2  # rows of the activation that one program computes


def activate(gate: Tensor, up: Tensor, weights: Tensor, slot: Tensor) -> Tensor:
    """silu(gate) * up * weight: gate, up [M,I], weights [T,K], slot [M] of each row -> [M,I].

    Computed in fp32 and rounded once. Its oracle is `moe.experts._activate`.
    """
    out, weights = torch.empty_like(gate), weights.contiguous()
    rows, width = gate.shape
    if rows:
        block = triton.next_power_of_2(width)
        grid = (triton.cdiv(rows, _ROWS),)
        _activate[grid](gate, up, weights, slot, out, rows, width, ROWS=_ROWS, BLOCK=block)
    return out


def activate_backward(
    gate: Tensor, up: Tensor, weights: Tensor, slot: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `activate` by gate, up [M,I] and weights [T,K], and its result.

    grad [M,I] is the gradient of the result, which takes its memory.
    Its oracle is `moe.experts._activate_backward`.
    """
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    weights = weights.contiguous()
    grad_weights = torch.zeros_like(weights)
    rows, width = gate.shape
    if rows:
        block = triton.next_power_of_2(width)
        grid = (triton.cdiv(rows, _ROWS),)
        tensors = (gate, up, weights, slot, grad, grad_gate, grad_up, grad_weights)
        _activate_backward[grid](*tensors, rows, width, ROWS=_ROWS, BLOCK=block)
    return grad_gate, grad_up, grad_weights, grad


def combine(bag_rows: Tensor, bag_starts: Tensor, rows: Tensor, more: Tensor | None = None) -> Tensor:
    """The sum of the rows of every token in fp32: bag_rows [M], bag_starts [T], rows and more [M,D] -> [T,D].

    Its oracle is torch's embedding_bag.
    """
    tokens, width, rows = len(bag_starts), rows.shape[1], rows.contiguous()
    out = rows.new_empty(tokens, width)
    if tokens and width:
        block = min(triton.next_power_of_2(width), 2048)
        grid = (tokens, triton.cdiv(width, block))
        tensors = (bag_rows, bag_starts, rows, more, out)
        _combine[grid](*tensors, tokens, len(rows), width, TWO=more is not None, BLOCK=block)
    return out


@triton.jit
def _activate(gate, up, weights, slot, out, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    here = (row < rows) & (column < width)
    at = row * width + column
    g = tl.load(gate + at, mask=here, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=here, other=0.0).to(tl.float32)
    place = tl.load(slot + row, mask=row < rows, other=0)
    weight = tl.load(weights + place).to(tl.float32)
    tl.store(out + at, g * tl.sigmoid(g) * u * weight, mask=here)


@triton.jit
def _activate_backward(
    gate,
    up,
    weights,
    slot,
    grad,
    grad_gate,
    grad_up,
    grad_weights,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    here = (row < rows) & (column < width)
    at = row * width + column
    g = tl.load(gate + at, mask=here, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=here, other=0.0).to(tl.float32)
    d = tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
    place = tl.load(slot + row, mask=row < rows, other=0)
    weight = tl.load(weights + place).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    grad_weight = tl.sum(d * silu * u, 1)[:, None]
    tl.store(grad_weights + place, grad_weight, mask=row < rows)
    d *= weight
    tl.store(grad_gate + at, d * u * sigmoid * (1 + g - silu), mask=here)
    tl.store(grad_up + at, d * silu, mask=here)
    tl.store(grad + at, silu * u * weight, mask=here)


@triton.jit
def _combine(
    bag_rows, bag_starts, rows, more, out, tokens, total, width, TWO: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    start = tl.load(bag_starts + token)
    end = tl.load(bag_starts + token + 1, mask=token + 1 < tokens, other=total)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for place in range(start, end):
        at = tl.load(bag_rows + place) * width + column
        sums += tl.load(rows + at, mask=here, other=0.0).to(tl.float32)
        if TWO:
            sums += tl.load(more + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, sums, mask=here)
