"""The load-balancing loss over the global batch (arXiv 2501.11873) and the router z-loss (arXiv 2202.08906).

Per MoE layer, over all valid tokens of one optimizer step:
    f_e = c_e / sum(c)            share of routed slots that went to expert e; constant in the gradient
    L   = E * sum_e f_e * S_e / T    with S_e the sum of the fp32 softmax over all experts; balanced = 1
A rank's share of one micro-batch is the same sum over its own S_e: shares add up to L of the global batch.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

# L MoE layers, E experts, T valid tokens of the global batch


def expert_frequencies(tokens_per_expert: Tensor) -> Tensor:
    """Share of the routed slots that each expert received: [L,E] counts -> [L,E], rows sum to 1."""
    return tokens_per_expert / tokens_per_expert.sum(dim=-1, keepdim=True).clamp(min=1)


def balance_loss_share(frequencies: Tensor, probability_sums: Tensor, num_tokens: int) -> Tensor:
    """This micro-batch's share of the balance loss of each layer: [L,E], [L,E] -> [L].

    `num_tokens` is T of the global batch, so that shares over ranks and micro-batches add up.
    """
    num_experts = probability_sums.shape[-1]
    return num_experts * (frequencies * probability_sums).sum(dim=-1) / num_tokens


class GlobalFrequencies:
    """The expert frequencies that the loss of each micro-batch uses.

    `exact`: those of the global batch. With one micro-batch per step they follow from one all-reduce of [L,E]
    counts after the forward; with more, `count_first` takes them from a pass without gradient.
    `micro_batch`: those of the micro-batch itself, no communication.
    """

    def __init__(self, mode: str, micro_batches_per_step: int) -> None:
        self.mode = mode
        self.counts_first = mode == "exact" and micro_batches_per_step > 1
        self._frequencies: Tensor | None = None

    def count_first(self, tokens_per_expert: Iterable[Tensor]) -> None:
        """Sum the [L,E] counts of this step's micro-batches over all ranks; every rank must call it."""
        self._frequencies = expert_frequencies(_all_reduced(torch.stack(list(tokens_per_expert)).sum(dim=0)))

    def of(self, tokens_per_expert: Tensor) -> Tensor:
        """Frequencies [L,E] for a micro-batch with these counts [L,E]; every rank must call it."""
        if self.mode == "micro_batch":
            return expert_frequencies(tokens_per_expert)
        if self.counts_first:
            assert self._frequencies is not None, "count_first comes before the first micro-batch of a step"
            return self._frequencies
        return expert_frequencies(_all_reduced(tokens_per_expert.clone()))


def _all_reduced(counts: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts
