"""Cross entropy of the language-model head that never holds the logits of all tokens.

The gradients are computed chunk by chunk inside the forward, while the logits exist, and scaled in the
backward (the idea of Liger-Kernel's fused linear cross entropy, arXiv 2410.10989).
"""
# T tokens, t tokens of one chunk, H hidden, V vocabulary

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.kernels.support import run_on
from moe.sums import accumulate

IGNORED = -100  # the label of a token without loss
CHUNK_BYTES = 2**30  # of the logits of a chunk and what is computed of them


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """Sum over labels != -100 of the cross entropy of `hidden @ weight.T`: a scalar, at least fp32.

    hidden [T, H], weight [V, H], labels [T] int64. The softmax and the sum of the weight gradient over chunks
    are fp32 (fp64 for fp64 inputs). Gradients are exact for any later scaling of the loss. A second backward
    through the same graph raises RuntimeError.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk_bytes)
    return _loss_and_gradients(hidden, weight, labels, chunk_bytes, (False, False))[0]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_bytes: int) -> Tensor:
        loss, *gradients = _loss_and_gradients(hidden, weight, labels, chunk_bytes, ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # In place, because [V, H] is large. A second backward fails autograd's version check.
        hidden_grad, weight_grad = (None if grad is None else grad.mul_(scale) for grad in ctx.saved_tensors)
        return hidden_grad, weight_grad, None, None


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_bytes: int, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and, if `wanted`, its gradients by hidden and by weight, each in the dtype of its operand."""
    precise = torch.promote_types(hidden.dtype, torch.float32)
    fused = run_on(hidden)
    hidden_grad = torch.empty_like(hidden) if wanted[0] else None
    weight_grad: Any = None
    losses = []
    bytes_per_logit = hidden.element_size() if fused else 2 * precise.itemsize
    longest = max(1, chunk_bytes // (weight.shape[0] * bytes_per_logit))  # tokens
    chunks = max(1, -(-len(hidden) // longest))
    starts = [len(hidden) * n // chunks for n in range(chunks + 1)]
    for start, stop in pairwise(starts):
        states = hidden[start:stop]  # [t, H]
        logits = states @ weight.T  # [t, V]
        if fused:
            from moe.kernels.cross_entropy import loss_and_gradient

            loss = loss_and_gradient(logits, labels[start:stop], IGNORED, any(wanted))
        else:
            loss, logits = _loss_and_gradient(logits, labels[start:stop], precise, any(wanted))
        losses.append(loss.sum())
        if hidden_grad is not None:
            torch.mm(logits, weight, out=hidden_grad[start:stop])
        if wanted[1]:
            product = logits.T @ states  # [V, H]
            if chunks == 1:
                weight_grad = product
            else:
                weight_grad = torch.empty_like(product, dtype=precise) if start == 0 else weight_grad
                accumulate(weight_grad, product, first=start == 0)
        del logits
    total = torch.stack(losses).sum()
    return total, hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype)


def _loss_and_gradient(
    logits: Tensor, labels: Tensor, precise: torch.dtype, gradient: bool
) -> tuple[Tensor, Tensor]:
    """logits [t, V], labels [t] -> the cross entropy of each token [t] in `precise`, and its gradient [t, V].

    The gradient has the dtype of the logits. Without `gradient` the logits are returned instead.
    """
    has_loss = labels[:, None] != IGNORED  # [t, 1]
    targets = labels[:, None].clamp(min=0)  # [t, 1]
    log_probabilities = logits.log_softmax(-1, dtype=precise)
    losses = -(log_probabilities.gather(1, targets) * has_loss).flatten()
    if not gradient:
        return losses, logits
    # softmax - one_hot(target), in the memory of the logarithms
    logits_grad = log_probabilities.exp_()
    logits_grad.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=precise))
    return losses, logits_grad.mul_(has_loss).to(logits.dtype)
