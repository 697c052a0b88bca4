"""Cross entropy of a chunk of logits and its gradient, in the memory of the logits."""
# t tokens, V vocabulary

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # logits that one program holds at a time


def loss_and_gradient(
    logits: Tensor,
    labels: Tensor,
    ignored: int,
    gradient: bool,
    temperature: float = 1.0,
    scales: Tensor | None = None,
    entropies: Tensor | None = None,
) -> Tensor:
    """logits [t,V], labels [t] -> the cross entropy of each token [t] fp32, 0 where the label is `ignored`.

    The softmax is that of logits / temperature. With `gradient`, the logits become the gradient by logits /
    temperature of the sum of the losses, each times its scale [t] fp32. The entropies [t] fp32 are filled in,
    if they are given. The softmax is computed in fp32 in one sweep over a row that keeps its maximum and sum
    (arXiv 1805.02867); a second sweep, which finds the row in the cache of the GPU, writes the gradient. Its
    oracle is `moe.cross_entropy.loss_of_labels`.
    """
    tokens, vocabulary = logits.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    if tokens:
        block = min(_BLOCK, triton.next_power_of_2(vocabulary))
        tensors = (logits, labels, scales, losses, entropies, vocabulary, 1 / temperature)
        asked = {"GRADIENT": gradient, "SCALED": scales is not None, "ENTROPIES": entropies is not None}
        _loss_and_gradient[(tokens,)](*tensors, IGNORED=ignored, **asked, BLOCK=block, num_warps=8)
    return losses


@triton.jit
def _loss_and_gradient(
    logits,
    labels,
    scales,
    losses,
    entropies,
    vocabulary,
    inverse_temperature,
    IGNORED: tl.constexpr,
    GRADIENT: tl.constexpr,
    SCALED: tl.constexpr,
    ENTROPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * vocabulary
    label = tl.load(labels + token)
    column = tl.arange(0, BLOCK)
    if label == IGNORED:
        tl.store(losses + token, 0.0)
        if ENTROPIES:
            tl.store(entropies + token, 0.0)
        if GRADIENT:
            for start in range(0, vocabulary, BLOCK):
                here = start + column < vocabulary
                tl.store(row + start + column, tl.zeros([BLOCK], dtype=tl.float32), mask=here)
    else:
        # each lane keeps the largest of its logits, its sum of p = exp(logit - largest), and of p * log(p)
        largest = tl.full([BLOCK], -1e30, dtype=tl.float32)  # finite: -inf - -inf is no number
        sums = tl.zeros([BLOCK], dtype=tl.float32)
        products = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, vocabulary, BLOCK):
            here = start + column < vocabulary
            x = tl.load(row + start + column, mask=here, other=-1e30).to(tl.float32) * inverse_temperature
            smaller = tl.exp(-tl.abs(x - largest))
            if ENTROPIES:
                step = x - largest
                moved = (products - sums * step) * smaller
                products = tl.where(step > 0, moved, products + smaller * step)
            sums = tl.where(x > largest, sums * smaller + 1.0, sums + smaller)
            largest = tl.maximum(x, largest)
        top = tl.max(largest, 0)
        smaller = tl.exp(largest - top)
        total = tl.sum(sums * smaller, 0)
        normalizer = top + tl.log(total)
        target = tl.load(row + label).to(tl.float32) * inverse_temperature
        tl.store(losses + token, normalizer - target)
        if ENTROPIES:
            product = tl.sum((products + sums * (largest - top)) * smaller, 0)
            tl.store(entropies + token, tl.log(total) - product / total)
        if GRADIENT:
            scale = 1.0
            if SCALED:
                scale = tl.load(scales + token)
            for start in range(0, vocabulary, BLOCK):
                here = start + column < vocabulary
                x = tl.load(row + start + column, mask=here, other=-1e30).to(tl.float32)
                x = tl.exp(x * inverse_temperature - normalizer)
                x = tl.where(start + column == label, x - 1.0, x) * scale
                tl.store(row + start + column, x, mask=here)
