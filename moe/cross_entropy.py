"""Cross entropy and log-probabilities of the language-model head that never hold the logits of all tokens.

The gradients of the cross entropy are computed chunk by chunk inside the forward, while the logits exist, and
scaled in the backward (the idea of Liger-Kernel's fused linear cross entropy, arXiv 2410.10989). The gradient
of a log-probability is known only in the backward, which computes the logits again.
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
    return _over_chunks(hidden, weight, labels, chunk_bytes)[0].sum()


def token_log_probs(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label in softmax(hidden @ weight.T / temperature), and that softmax's entropy.

    hidden [T, H], weight [V, H], labels [T] int64, temperature > 0 -> [T] and, without a gradient, [T]; both
    are 0 where the label is -100. Softmax and sums are fp32 (fp64 for fp64 inputs).
    """
    assert temperature > 0, temperature
    return _TokenLogProbs.apply(hidden, weight, labels, temperature, chunk_bytes)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_bytes: int) -> Tensor:
        losses, *gradients = _over_chunks(hidden, weight, labels, chunk_bytes, ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # In place, because [V, H] is large. A second backward fails autograd's version check.
        hidden_grad, weight_grad = (None if grad is None else grad.mul_(scale) for grad in ctx.saved_tensors)
        return hidden_grad, weight_grad, None, None


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, chunk_bytes: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, labels)  # the parameter: ZeRO-3 fills it again for the backward
        ctx.chunk_bytes, ctx.temperature = chunk_bytes, temperature
        entropies = hidden.new_empty(len(hidden), dtype=_precise(hidden))
        losses, *_ = _over_chunks(
            hidden, weight, labels, chunk_bytes, temperature=temperature, entropies=entropies
        )
        ctx.mark_non_differentiable(entropies)
        return -losses, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, log_probs_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scales = -log_probs_grad / ctx.temperature  # [T]: the logits are divided before the softmax
        hidden, weight, labels = ctx.saved_tensors
        settings = ctx.chunk_bytes, ctx.needs_input_grad[:2], ctx.temperature
        _, *gradients = _over_chunks(hidden, weight, labels, *settings, scales)
        return *gradients, None, None, None


def _precise(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _over_chunks(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_bytes: int,
    wanted: tuple[bool, ...] = (False, False),
    temperature: float = 1.0,
    scales: Tensor | None = None,
    entropies: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss of each token [T] and, if `wanted`, gradients by hidden and by weight, in their dtypes.

    The gradients are those of the sum of the losses, of which each token's is multiplied by its scale [T].
    The entropies [T] are filled in, if they are given.
    """
    precise, fused = _precise(hidden), run_on(hidden)
    hidden_grad = torch.empty_like(hidden) if wanted[0] else None
    weight_grad: Any = None
    losses: list[Tensor] = []
    # [t, V] that exist at once: the logits, their softmax and the terms of the entropies
    bytes_per_logit = hidden.element_size() if fused else (2 if entropies is None else 3) * precise.itemsize
    longest = max(1, chunk_bytes // (weight.shape[0] * bytes_per_logit))  # tokens
    chunks = max(1, -(-len(hidden) // longest))
    starts = [len(hidden) * n // chunks for n in range(chunks + 1)]
    for start, stop in pairwise(starts):
        states = hidden[start:stop]  # [t, H]
        logits = states @ weight.T  # [t, V]
        of_tokens = [None if values is None else values[start:stop] for values in (scales, entropies)]
        if fused:
            from moe.kernels.cross_entropy import loss_and_gradient

            loss = loss_and_gradient(
                logits, labels[start:stop], IGNORED, any(wanted), temperature, *of_tokens
            )
        else:
            logits = logits if temperature == 1 else logits.to(precise).div_(temperature)
            loss, logits = _loss_and_gradient(logits, labels[start:stop], precise, any(wanted), *of_tokens)
        losses.append(loss)
        if any(wanted):
            logits = logits.to(hidden.dtype)
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
    return torch.cat(losses), hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype)


def _loss_and_gradient(
    logits: Tensor,
    labels: Tensor,
    precise: torch.dtype,
    gradient: bool,
    scales: Tensor | None = None,
    entropies: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """logits [t, V], labels [t] -> the cross entropy of each token [t] and its gradient [t, V], in `precise`.

    Each token's gradient is multiplied by its scale [t]. Without `gradient` something else is returned in its
    place. The entropies [t] are filled in, if they are given; 0 without a label.
    """
    has_loss = labels[:, None] != IGNORED  # [t, 1]
    targets = labels[:, None].clamp(min=0)  # [t, 1]
    log_probabilities = logits.log_softmax(-1, dtype=precise)
    losses = -(log_probabilities.gather(1, targets) * has_loss).flatten()
    if entropies is None and not gradient:
        return losses, logits
    probabilities = log_probabilities.exp_()  # in the memory of the logarithms
    if entropies is not None:
        torch.mul(torch.special.entr(probabilities).sum(-1), has_loss[:, 0], out=entropies)
    if gradient:  # softmax - one_hot(target)
        probabilities.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=precise))
        probabilities.mul_(has_loss if scales is None else has_loss * scales[:, None])
    return losses, probabilities
