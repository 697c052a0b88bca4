"""The loss of reinforcement learning: a clipped surrogate of the advantages of sampled completions.

A completion is the tokens with a label of one document. GRPO (arXiv 2402.03300) and its variants differ in
few choices, which are keys of `rl`: the advantage, what a completion's tokens are divided by, and whether an
importance ratio is one of a token or of a completion.
"""
# P prompts, G completions of each, N completions of the global batch, B rows, S tokens per row, T = B*S

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from data_pipeline.loader import Batch
from moe.documents import Documents
from moe.router import SampledExperts
from trainer.settings.rl import RLConfig

EPSILON = 1e-4  # added to the deviation of a group's rewards, as in TRL


@dataclass(frozen=True)
class PolicyBatch(Batch):
    """A batch of prompts with completions, made by `PolicyBatch(**vars(batch), ...)`."""

    sampled_log_probs: Tensor  # [B,S] fp32: of the labels, when sampled
    reference_log_probs: Tensor | None  # [B,S] fp32: of the labels in the reference; None if kl_coef is 0
    advantages: Tensor  # [B,S] fp32
    weights: Tensor  # [B,S] fp32: share of a token in the loss of the global batch, `token_weights`; else 0
    temperature: float  # of all these probabilities
    sampled_experts: Tensor | None = None  # [T,L,K] int16: those that sampling chose, if they were kept
    replay: bool = False  # whether the loss uses them

    def options(self) -> dict[str, Any]:
        """What the model's forward takes beside a Batch."""
        experts = self.sampled_experts
        sampled = None if experts is None else SampledExperts(experts, self.replay)
        return {"how": self.temperature, "sampled": sampled}


class PolicyTerms(NamedTuple):
    """The loss of one micro-batch, and sums for metrics."""

    loss: Tensor  # scalar fp32 with gradient: a share of the global batch
    sums: Tensor  # [len(SUMS)] fp64 over the tokens with a weight; they add up over micro-batches and ranks


# Their number; those whose loss the lower or upper bound of the ratio holds constant; the ratios of the loss;
# estimates of the divergence from the policy that sampled and from the reference; the entropies.
SUMS = ("tokens", "clipped_low", "clipped_high", "ratio", "sampling_kl", "reference_kl", "entropy")


def flat_groups(rewards: Tensor) -> Tensor:
    """rewards [P,G] -> [P] bool: the completions of a prompt have the same reward, which teaches nothing."""
    return (rewards == rewards[:, :1]).all(dim=1)


def group_advantages(rewards: Tensor, how: Literal["deviation", "mean"]) -> Tensor:
    """rewards [P,G] -> [P,G] how much better a completion is than the mean of its group; 0 in a flat group.

    "deviation" divides by the standard deviation of the group (arXiv 2402.03300, section 4.1.2): that of a
    sample, with G - 1, plus EPSILON, both as in TRL. "mean" does not (arXiv 2503.20783).
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if how == "deviation":
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + EPSILON)
    return advantages.masked_fill(flat_groups(rewards)[:, None], 0.0)  # a mean may be rounded


def token_weights(
    lengths: Tensor, learned: Tensor, how: Literal["token", "sequence", "constant"], max_new_tokens: int
) -> Tensor:
    """The weight in the loss of each token of each completion of the global batch: [N] fp64.

    lengths [N]: tokens of each completion. learned [N] bool: False leaves a completion out. Its weight is 0,
    and it counts neither among the tokens nor among the completions that the others are divided by.

    "token": 1 / all tokens (DAPO, arXiv 2503.14476). "sequence": 1 / (completions * length) (GRPO, arXiv
    2402.03300). "constant": 1 / (completions * max_new_tokens) (Dr. GRPO, arXiv 2503.20783).
    """
    lengths, share = lengths.double(), learned.double()
    if how == "token":
        return share / (lengths * share).sum().clamp(min=1)
    share = share / share.sum().clamp(min=1)
    return share / (lengths.clamp(min=1) if how == "sequence" else max_new_tokens)


def overlong_penalty(length: int, max_new_tokens: int, buffer: int) -> float:
    """What the reward of a completion changes by: 0 up to `buffer` tokens before the limit, there -1.

    It falls linearly between (DAPO, arXiv 2503.14476, equation 13).
    """
    return min(0.0, max(-1.0, (max_new_tokens - buffer - length) / max(buffer, 1)))


def policy_loss(log_probs: Tensor, entropies: Tensor, batch: PolicyBatch, config: RLConfig) -> PolicyTerms:
    """The loss of a micro-batch from the log-probabilities of its labels; log_probs, entropies [B,S].

    loss = sum of weight * (kl_coef * divergence - min(ratio * advantage, clipped ratio * advantage)), with
    the ratio clipped to [1 - clip_low, 1 + clip_high] (arXiv 2503.14476, equation 8). Tokens without a weight
    do not count, whatever their probabilities.
    """
    counted = batch.weights > 0
    log_ratio = _difference(log_probs, batch.sampled_log_probs, counted)
    ratio = (_completion_means(log_ratio, counted, batch) if config.ratio == "sequence" else log_ratio).exp()
    low, high = 1 - config.clip_low, 1 + config.clip_high
    advantages = batch.advantages
    losses = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    reference_kl = torch.zeros_like(losses)
    if batch.reference_log_probs is not None:
        reference_kl = _divergence(_difference(batch.reference_log_probs, log_probs, counted))
        losses = losses + config.kl_coef * reference_kl
    of_tokens = {
        "tokens": counted,
        "clipped_low": (ratio < low) & (advantages < 0),
        "clipped_high": (ratio > high) & (advantages > 0),
        "ratio": ratio,
        "sampling_kl": _divergence(log_ratio),
        "reference_kl": reference_kl,
        "entropy": entropies,
    }
    sums = [(of_tokens[name].detach() * counted).sum(dtype=torch.float64) for name in SUMS]
    return PolicyTerms((batch.weights * losses).sum(), torch.stack(sums))


def _difference(log_probs: Tensor, of_other: Tensor, counted: Tensor) -> Tensor:
    """The logarithm of a ratio of probabilities [B,S]; 0 without a weight, so that exp is finite there."""
    return torch.where(counted, log_probs - of_other, 0.0)


def _divergence(log_ratio: Tensor) -> Tensor:
    """log(p / q) at samples of q -> an estimate of KL(q || p), never negative (arXiv 2402.03300, eq. 4)."""
    return log_ratio.exp() - log_ratio - 1


def _completion_means(log_ratio: Tensor, counted: Tensor, batch: Batch) -> Tensor:
    """[B,S] -> at each token the mean over its completion (GSPO, arXiv 2507.18071, section 4.1)."""
    number = Documents(batch.cu_seqlens, batch.lengths).number  # [T]
    values = torch.stack([log_ratio.flatten(), counted.flatten().to(log_ratio.dtype)], dim=1)  # [T,2]
    sums = values.new_zeros(len(batch.lengths), 2).index_add(0, number, values)  # [D,2]
    return (sums[:, 0] / sums[:, 1].clamp(min=1))[number].view_as(log_ratio)
