"""Cross entropy of the language-model head that never holds the logits of all tokens.

The gradients are computed chunk by chunk inside the forward, while the logits exist, and scaled in the
backward (the idea of Liger-Kernel's fused linear cross entropy, arXiv 2410.10989).
"""
# T tokens, t tokens of one chunk, H hidden, V vocabulary

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # the label of a token without loss
LOGITS_PER_CHUNK = 2**27  # 0.5 GiB in fp32; 883 tokens with Qwen3's vocabulary, enough to occupy a GPU


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, logits_per_chunk: int = LOGITS_PER_CHUNK
) -> Tensor:
    """Sum over labels != -100 of the cross entropy of `hidden @ weight.T`: a scalar, at least fp32.

    hidden [T, H], weight [V, H], labels [T] int64. The softmax and the sum of the weight gradient over chunks
    are fp32 (fp64 for fp64 inputs). Gradients are exact for any later scaling of the loss. A second backward
    through the same graph raises RuntimeError.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _ChunkedCrossEntropy.apply(hidden, weight, labels, logits_per_chunk)
    return _loss_and_gradients(hidden, weight, labels, logits_per_chunk, (False, False))[0]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, logits_per_chunk: int) -> Tensor:
        loss, *gradients = _loss_and_gradients(
            hidden, weight, labels, logits_per_chunk, ctx.needs_input_grad[:2]
        )
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # In place, because [V, H] is large. A second backward fails autograd's version check.
        hidden_grad, weight_grad = (None if grad is None else grad.mul_(scale) for grad in ctx.saved_tensors)
        return hidden_grad, weight_grad, None, None


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, logits_per_chunk: int, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and, if `wanted`, its gradients by hidden and by weight, each in the dtype of its operand."""
    precise = torch.promote_types(hidden.dtype, torch.float32)
    loss = torch.zeros((), dtype=precise, device=hidden.device)
    hidden_grad = torch.empty_like(hidden) if wanted[0] else None
    weight_grad = torch.zeros_like(weight, dtype=precise) if wanted[1] else None
    chunk = max(1, logits_per_chunk // weight.shape[0])
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        states = hidden[part]  # [t, H]
        has_loss = labels[part, None] != IGNORED  # [t, 1]
        targets = labels[part, None].clamp(min=0)  # [t, 1]
        logits = (states @ weight.T).to(precise)  # [t, V]
        normalizer = logits.logsumexp(dim=-1, keepdim=True)  # [t, 1]
        loss += ((normalizer - logits.gather(1, targets)) * has_loss).sum()
        if not any(wanted):
            continue
        # d loss / d logits = softmax - one_hot(target), in the memory of the logits
        logits_grad = logits.sub_(normalizer).exp_()
        logits_grad.scatter_add_(1, targets, torch.full_like(normalizer, -1.0))
        logits_grad = logits_grad.mul_(has_loss).to(weight.dtype)
        if hidden_grad is not None:
            hidden_grad[part] = logits_grad @ weight
        if weight_grad is not None:
            weight_grad += logits_grad.T @ states
    return loss, hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype)
