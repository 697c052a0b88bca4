"""Cross entropy of a chunk of logits and its gradient, in the memory of the logits."""
# t tokens, V vocabulary

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # logits that one program holds at a time


def loss_and_gradient(logits: Tensor, labels: Tensor, ignored: int, gradient: bool) -> Tensor:
    """logits [t,V], labels [t] -> the cross entropy of each token [t] fp32, 0 where the label is `ignored`.

    With `gradient`, the logits become the gradient of the sum of the losses. The softmax is computed in fp32
    in one sweep over a row that keeps its maximum and sum (arXiv 1805.02867); a second sweep, which finds the
    row in the cache of the GPU, writes the gradient. Its oracle is `moe.cross_entropy._loss_and_gradient`.
    """
    tokens, vocabulary = logits.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    if tokens:
        block = min(_BLOCK, triton.next_power_of_2(vocabulary))
        tensors = (logits, labels, losses, vocabulary)
        _loss_and_gradient[(tokens,)](*tensors, IGNORED=ignored, GRADIENT=gradient, BLOCK=block, num_warps=8)
    return losses


@triton.jit
def _loss_and_gradient(
    logits,
    labels,
    losses,
    vocabulary,
    IGNORED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * vocabulary
    label = tl.load(labels + token)
    column = tl.arange(0, BLOCK)
    if label == IGNORED:
        tl.store(losses + token, 0.0)
        if GRADIENT:
            for start in range(0, vocabulary, BLOCK):
                here = start + column < vocabulary
                tl.store(row + start + column, tl.zeros([BLOCK], dtype=tl.float32), mask=here)
    else:
        # each lane keeps the largest of its logits, and its sum of exp(logit - largest)
        largest = tl.full([BLOCK], -1e30, dtype=tl.float32)  # finite: -inf - -inf is no number
        sums = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, vocabulary, BLOCK):
            here = start + column < vocabulary
            x = tl.load(row + start + column, mask=here, other=-1e30).to(tl.float32)
            smaller = tl.exp(-tl.abs(x - largest))
            sums = tl.where(x > largest, sums * smaller + 1.0, sums + smaller)
            largest = tl.maximum(x, largest)
        top = tl.max(largest, 0)
        normalizer = top + tl.log(tl.sum(sums * tl.exp(largest - top), 0))
        target = tl.load(row + label).to(tl.float32)
        tl.store(losses + token, normalizer - target)
        if GRADIENT:
            for start in range(0, vocabulary, BLOCK):
                here = start + column < vocabulary
                x = tl.load(row + start + column, mask=here, other=-1e30).to(tl.float32)
                x = tl.exp(x - normalizer)
                tl.store(row + start + column, tl.where(start + column == label, x - 1.0, x), mask=here)
