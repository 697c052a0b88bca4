"""Routing from the logits in one pass: softmax, top-k, weights and statistics; and its gradient."""
# T tokens, E experts, K experts per token

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_LOGITS = 1024  # of the tokens that one program routes; with twice as many, registers spill to memory


def route(
    logits: Tensor,
    selection_bias: Tensor | None,
    token_mask: Tensor | None,
    top_k: int,
    normalize: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """logits [T,E] fp32, selection_bias [E] fp32, token_mask [T] bool -> weights [T,K], indices [T,K], sums.

    The weights have `dtype`; with `normalize` they add up to 1. The sums are the fields of RouterStatistics.
    Its oracle is `moe.router._route`.
    """
    return _Routing.apply(logits, selection_bias, token_mask, top_k, normalize, dtype)


class _Routing(Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        selection_bias: Tensor | None,
        token_mask: Tensor | None,
        top_k: int,
        normalize: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        tokens, experts = logits.shape
        settings = _settings(experts, top_k, normalize, token_mask, selection_bias)
        programs = triton.cdiv(tokens, settings["TOKENS"])
        weights = logits.new_empty(tokens, top_k, dtype=dtype)
        indices = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
        sums = logits.new_empty(programs, 2 * experts + 2)  # of each program; added up in a fixed order below
        ranges = logits.new_zeros(programs + 1)  # one more, which stays 0: there may be no token
        if tokens:
            tensors = (logits, selection_bias, token_mask, weights, indices, sums, ranges)
            _forward[(programs,)](*tensors, tokens, experts, **settings)
        ctx.save_for_backward(logits, token_mask, indices)
        ctx.settings = settings
        counts, probabilities, z, entropy = sums.sum(0).split((experts, experts, 1, 1))
        statistics = (counts, probabilities, z.squeeze(0), entropy.squeeze(0), ranges.max())
        ctx.mark_non_differentiable(indices, counts, statistics[3], statistics[4])
        return weights, indices, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_weights, _, _, grad_probabilities, grad_z, *_ = (grad.contiguous() for grad in grads)
        logits, token_mask, indices = ctx.saved_tensors
        tokens, experts = logits.shape
        grad = torch.empty_like(logits)
        if tokens:
            tensors = (logits, token_mask, indices, grad_weights, grad_probabilities, grad_z, grad)
            settings = {key: value for key, value in ctx.settings.items() if key != "BIASED"}
            programs = triton.cdiv(tokens, settings["TOKENS"])
            _backward[(programs,)](*tensors, tokens, experts, **settings)
        return grad, None, None, None, None, None


def _settings(
    experts: int, top_k: int, normalize: bool, token_mask: Tensor | None, selection_bias: Tensor | None
) -> dict[str, Any]:
    width = triton.next_power_of_2(experts)
    return {
        "TOKENS": min(16, max(1, _LOGITS // width)),
        "EXPERTS": width,
        "K": top_k,
        "COLUMNS": triton.next_power_of_2(top_k),
        "NORMALIZE": normalize,
        "MASKED": token_mask is not None,
        "BIASED": selection_bias is not None,
    }


@triton.jit
def _softmax(logits, token, expert, tokens, experts):
    """The logits of some tokens, their probabilities, logsumexp [tokens,1], and where there is an expert."""
    there = (token < tokens) & (expert < experts)
    x = tl.load(logits + token * experts + expert, mask=there, other=0.0)
    inside = tl.where(expert < experts, x, float("-inf"))
    top = tl.max(inside, 1)[:, None]
    power = tl.exp(inside - top)
    total = tl.sum(power, 1)[:, None]
    return x, power / total, top + tl.log(total), there


@triton.jit
def _forward(
    logits,
    selection_bias,
    token_mask,
    weights,
    indices,
    sums,
    ranges,
    tokens,
    experts,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MASKED: tl.constexpr,
    BIASED: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    token = program * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert = tl.arange(0, EXPERTS)[None, :]
    column = tl.arange(0, COLUMNS)[None, :]
    x, probability, normalizer, there = _softmax(logits, token, expert, tokens, experts)
    counts = (token < tokens).to(tl.float32)
    if MASKED:
        counts = tl.load(token_mask + token, mask=token < tokens, other=0).to(tl.float32)
    score = probability
    if BIASED:
        score += tl.load(selection_bias + expert, mask=expert < experts, other=0.0)
    score = tl.where(expert < experts, score, float("-inf"))
    chosen_by = tl.zeros([TOKENS, EXPERTS], dtype=tl.float32)
    chosen_weights = tl.zeros([TOKENS, COLUMNS], dtype=tl.float32)
    for k in tl.static_range(K):
        best = tl.minimum(tl.argmax(score, 1), experts - 1)[:, None]  # in range even if all are NaN
        tl.store(indices + token * K + k, best, mask=token < tokens)
        chosen = (expert == best).to(tl.float32)
        weight = tl.sum(chosen * tl.where(expert < experts, probability, 0.0), 1)[:, None]
        chosen_weights = tl.where(column == k, weight, chosen_weights)
        chosen_by += chosen
        score = tl.where(expert == best, float("-inf"), score)
    if NORMALIZE:
        chosen_weights /= tl.sum(chosen_weights, 1)[:, None]
    tl.store(weights + token * K + column, chosen_weights, mask=(token < tokens) & (column < K))

    at, here = sums + program * (2 * experts + 2), expert < experts
    tl.store(at + expert, tl.sum(chosen_by * counts, 0)[None, :], mask=here)
    tl.store(at + experts + expert, tl.sum(probability * counts, 0)[None, :], mask=here)
    tl.store(at + 2 * experts, tl.sum(normalizer * normalizer * counts))
    mean = tl.sum(probability * x, 1)[:, None]
    tl.store(at + 2 * experts + 1, tl.sum((normalizer - mean) * counts))
    high = tl.max(tl.where(there, x, float("-inf")), 1)[:, None]
    low = tl.min(tl.where(there, x, float("inf")), 1)[:, None]
    tl.store(ranges + program, tl.max(tl.where(counts > 0, high - low, 0.0)))


@triton.jit
def _backward(
    logits,
    token_mask,
    indices,
    grad_weights,
    grad_probabilities,
    grad_z,
    grad,
    tokens,
    experts,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MASKED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert = tl.arange(0, EXPERTS)[None, :]
    _, probability, normalizer, there = _softmax(logits, token, expert, tokens, experts)
    counts = (token < tokens).to(tl.float32)
    if MASKED:
        counts = tl.load(token_mask + token, mask=token < tokens, other=0).to(tl.float32)
    chosen = tl.zeros([TOKENS, EXPERTS], dtype=tl.float32)
    by_choice = tl.zeros(
        [TOKENS, EXPERTS], dtype=tl.float32
    )  # the gradient of the weight of each chosen expert
    for k in tl.static_range(K):
        index = tl.load(indices + token * K + k, mask=token < tokens, other=0)
        arriving = tl.load(grad_weights + token * K + k, mask=token < tokens, other=0.0).to(tl.float32)
        chosen += (expert == index).to(tl.float32)
        by_choice += tl.where(expert == index, arriving, 0.0)
    if NORMALIZE:  # weight = p / sum of the chosen p
        total = tl.sum(chosen * probability, 1)[:, None]
        mean = tl.sum(by_choice * probability, 1)[:, None] / total
        by_choice = (by_choice - mean * chosen) / total
    shared = tl.load(grad_probabilities + expert, mask=expert < experts, other=0.0)
    by_probability = by_choice + shared * counts
    mean = tl.sum(by_probability * probability, 1)[:, None]
    by_normalizer = 2 * normalizer * counts * tl.load(grad_z)
    result = probability * (by_probability - mean + by_normalizer)
    tl.store(grad + token * experts + expert, result, mask=there)
