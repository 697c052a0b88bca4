"""The passes of the experts over memory besides their matrix products: activation, its gradient, combine."""
# M rows, I intermediate, T tokens, K slots per token, D width of a row

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 2  # rows of the activation that one program computes


def activate(gate_up: Tensor, weights: Tensor, slot: Tensor) -> Tensor:
    """silu(gate) * up * weight: gate_up [M,2I], weights [T,K], slot [M] of each row -> [M,I].

    Computed in fp32 and rounded once. Its oracle is `moe.experts._activate`.
    """
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out, weights = gate_up.new_empty(rows, width), weights.contiguous()
    if rows:
        block = triton.next_power_of_2(width)
        grid = (triton.cdiv(rows, _ROWS),)
        _activate[grid](gate_up, weights, slot, out, rows, width, ROWS=_ROWS, BLOCK=block)
    return out


def activate_backward(
    gate_up: Tensor, weights: Tensor, slot: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `activate` by gate_up [M,2I] and weights [T,K], and its result [M,I].

    grad [M,I] is the gradient of the result, which takes its memory.
    Its oracle is `moe.experts._activate_backward`.
    """
    rows, width = grad.shape
    weights = weights.contiguous()
    grad_gate_up, grad_weights = torch.empty_like(gate_up), torch.zeros_like(weights)
    if rows:
        block = triton.next_power_of_2(width)
        grid = (triton.cdiv(rows, _ROWS),)
        tensors = (gate_up, weights, slot, grad, grad_gate_up, grad_weights)
        _activate_backward[grid](*tensors, rows, width, ROWS=_ROWS, BLOCK=block)
    return grad_gate_up, grad_weights, grad


def combine(bag_rows: Tensor, bag_starts: Tensor, rows: Tensor) -> Tensor:
    """The sum of the rows of every token in fp32: bag_rows [M], bag_starts [T], rows [M,D] -> [T,D].

    Its oracle is torch's embedding_bag.
    """
    tokens, width, rows = len(bag_starts), rows.shape[1], rows.contiguous()
    out = rows.new_empty(tokens, width)
    if tokens and width:
        block = min(triton.next_power_of_2(width), 2048)
        grid = (tokens, triton.cdiv(width, block))
        _combine[grid](bag_rows, bag_starts, rows, out, tokens, len(rows), width, BLOCK=block)
    return out


@triton.jit
def _load(gate_up, weights, slot, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows and columns of a program, gate and up, and the place and value of each row's weight."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    here = (row < rows) & (column < width)
    at = gate_up + row * 2 * width + column
    gate = tl.load(at, mask=here, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=here, other=0.0).to(tl.float32)
    place = tl.load(slot + row, mask=row < rows, other=0)
    return row, column, here, gate, up, place, tl.load(weights + place).to(tl.float32)


@triton.jit
def _activate(gate_up, weights, slot, out, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, column, here, gate, up, _, weight = _load(gate_up, weights, slot, rows, width, ROWS, BLOCK)
    tl.store(out + row * width + column, gate * tl.sigmoid(gate) * up * weight, mask=here)


@triton.jit
def _activate_backward(
    gate_up,
    weights,
    slot,
    grad,
    grad_gate_up,
    grad_weights,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, here, gate, up, place, weight = _load(gate_up, weights, slot, rows, width, ROWS, BLOCK)
    at = grad + row * width + column
    arriving = tl.load(at, mask=here, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(grad_weights + place, tl.sum(arriving * silu * up, 1)[:, None], mask=row < rows)
    tl.store(at, silu * up * weight, mask=here)
    arriving *= weight
    at = grad_gate_up + row * 2 * width + column
    tl.store(at, arriving * up * sigmoid * (1 + gate - silu), mask=here)
    tl.store(at + width, arriving * silu, mask=here)


@triton.jit
def _combine(bag_rows, bag_starts, rows, out, tokens, total, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    start = tl.load(bag_starts + token)
    end = tl.load(bag_starts + token + 1, mask=token + 1 < tokens, other=total)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for place in range(start, end):
        row = tl.load(bag_rows + place)
        sums += tl.load(rows + row * width + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, sums, mask=here)
