"""Learning from the distribution of a teacher over the vocabulary (arXiv 1503.02531).

The teacher's k most probable tokens are kept, and all others as one more entry, so that the divergence is one
of distributions over k + 1 outcomes: never more than that over the vocabulary, and equal to it at k = V.
Without the rest it would pull the student to too few tokens (arXiv 2503.16870).
"""
# T tokens, t tokens of one chunk, H hidden, V vocabulary, k tokens of the teacher

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.cross_entropy import CHUNK_BYTES, IGNORED, loss_of_labels, over_chunks, precise_dtype

_TEACHING, _LEARNING = 3, 6  # tensors [t, V] that exist at once


class Lesson(NamedTuple):
    """What a teacher says of the next token at each position, and how a student learns of it."""

    ids: Tensor  # [T, k] int32: the teacher's most probable tokens
    log_probs: (
        Tensor  # [T, k+1] fp32 in softmax(teacher's logits / temperature); the last: all others together
    )
    temperature: float  # of the teacher's and the student's distribution
    reverse: bool  # KL(student | teacher); otherwise KL(teacher | student)
    weight: float  # of temperature^2 * divergence in the loss; the cross entropy of the labels has the rest


class Teaching(NamedTuple):
    """What a teacher is asked for."""

    k: int  # tokens of each distribution
    temperature: float


def teach(
    hidden: Tensor, weight: Tensor, k: int, temperature: float, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """The k most probable tokens of softmax(hidden @ weight.T / temperature), as in `Lesson`.

    hidden [T, H], weight [V, H] -> ids [T, k] int32, log-probabilities [T, k+1], at least fp32; no gradient.
    """
    ids = torch.empty(len(hidden), k, dtype=torch.int32, device=hidden.device)

    def of_chunk(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        log_probs = logits.to(precise_dtype(hidden)).div_(temperature).log_softmax(-1)
        top = log_probs.topk(k).indices
        ids[part] = top
        return _with_rest(log_probs, top), logits

    most = chunk_bytes // (_TEACHING * precise_dtype(hidden).itemsize)
    with torch.no_grad():
        return ids, over_chunks(hidden, weight, of_chunk, most, (False, False))[0]


def chunked_distillation(
    hidden: Tensor, weight: Tensor, labels: Tensor, lesson: Lesson, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over labels != -100 of the loss, the cross entropy of the labels, and the divergence.

    hidden [T, H], weight [V, H], labels [T] int64 -> three scalars, at least fp32; only the loss has a
    gradient. loss = (1 - weight) * cross entropy + weight * temperature^2 * divergence: the square keeps the
    gradient at any temperature comparable (arXiv 1503.02531, section 2). As for `chunked_cross_entropy`,
    gradients are exact for any later scaling, and a second backward raises RuntimeError.
    """
    return _Distillation.apply(hidden, weight, labels, lesson, chunk_bytes)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, lesson: Lesson, chunk_bytes: int
    ) -> tuple[Tensor, ...]:
        wanted, precise = ctx.needs_input_grad[:2], precise_dtype(hidden)

        def of_chunk(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            few = lesson._replace(ids=lesson.ids[part].long(), log_probs=lesson.log_probs[part])
            return _of_chunk(logits, labels[part], few, precise)

        most = chunk_bytes // (_LEARNING * precise.itemsize)
        values, *gradients = over_chunks(hidden, weight, of_chunk, most, wanted)
        ctx.save_for_backward(*gradients)
        loss, cross_entropy, divergence = values.sum(0)
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return loss, cross_entropy, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place, because [V, H] is large. A second backward fails autograd's version check.
        hidden_grad, weight_grad = (None if grad is None else grad.mul_(scale) for grad in ctx.saved_tensors)
        return hidden_grad, weight_grad, None, None, None


def _of_chunk(logits: Tensor, labels: Tensor, lesson: Lesson, precise: torch.dtype) -> tuple[Tensor, Tensor]:
    """logits [t, V], labels [t] -> of each token loss, cross entropy, divergence [t, 3], and the gradient."""
    has_loss, share = (labels != IGNORED)[:, None], lesson.weight  # [t, 1]
    cross_entropy, gradient = loss_of_labels(logits, labels, precise, True)
    divergence, of_divergence = _divergence(logits.to(precise) / lesson.temperature, lesson)
    divergence = divergence * has_loss[:, 0]
    loss = (1 - share) * cross_entropy + share * lesson.temperature**2 * divergence
    gradient.mul_(1 - share).add_(of_divergence.mul_(has_loss), alpha=share * lesson.temperature)
    return torch.stack([loss, cross_entropy, divergence], dim=1), gradient


def _divergence(scaled: Tensor, lesson: Lesson) -> tuple[Tensor, Tensor]:
    """scaled [t, V] logits of the student / temperature -> divergence [t], and its gradient [t, V]."""
    student = scaled.log_softmax(-1)  # [t, V]
    known = _with_rest(student, lesson.ids)  # [t, k+1]
    teacher = lesson.log_probs.to(known.dtype)
    # k = V leaves no rest; a student without any is as far from the teacher as numbers say
    ratio = torch.where(teacher.isinf(), 0.0, known - teacher).clamp(-_FAR, _FAR)  # log(student / teacher)
    probabilities = student.exp_()  # in the memory of the logarithms
    if lesson.reverse:  # each entry's log ratio, less their mean
        divergence = (known.exp() * ratio).sum(-1)
        factors = ratio - divergence[:, None]
        top = probabilities.gather(1, lesson.ids) * factors[:, :-1]
    else:
        divergence = -(teacher.exp() * ratio).sum(-1)
        factors = 1 - (-ratio).exp()
        top = probabilities.gather(1, lesson.ids) - teacher[:, :-1].exp()
    return divergence, probabilities.mul_(factors[:, -1:]).scatter_(1, lesson.ids, top)


_FAR = 80.0  # of a log ratio: exp is finite in fp32


def _with_rest(log_probs: Tensor, ids: Tensor) -> Tensor:
    """log_probs [t, V], ids [t, k] -> [t, k+1]: those of the ids, and of all other tokens together."""
    rest = log_probs.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(1, ids), rest], dim=1)
