"""The load-balancing loss over the global batch (arXiv 2501.11873) and its alternatives.

Per MoE layer, over all valid tokens of one optimizer step:
    f_e = c_e / (K T)             share of the routed slots that went to expert e; constant in the gradient
    L   = E * sum_e f_e * S_e / T    with S_e the sum of the fp32 softmax over all experts; balanced = 1
The share of one micro-batch on one rank is the same formula with its own S_e: the shares of all micro-batches
and ranks add up to L of the global batch.
"""

import torch
import torch.distributed as dist
from torch import Tensor

# L MoE layers, E experts, K experts per token, T valid tokens of the global batch


def expert_frequencies(tokens_per_expert: Tensor) -> Tensor:
    """Share of the routed slots that each expert received: [L,E] counts -> [L,E], rows sum to 1."""
    return tokens_per_expert / tokens_per_expert.sum(dim=-1, keepdim=True).clamp(min=1)


def balance_loss_share(frequencies: Tensor, probability_sums: Tensor, num_tokens: int) -> Tensor:
    """This micro-batch's share of the balance loss of each layer: [L,E], [L,E] -> [L].

    `num_tokens` is T of the global batch, so that shares over ranks and micro-batches add up.
    """
    num_experts = probability_sums.shape[-1]
    return num_experts * (frequencies * probability_sums).sum(dim=-1) / num_tokens


class Balance:
    """Expert frequencies for the loss of each micro-batch, and the selection bias of aux-free balancing.

    mode `exact`: frequencies of the global batch. With one micro-batch per step, one all-reduce of [L,E]
    counts after the forward gives them; with more, the caller first counts all of them: `count_first`.
    mode `buffer`: of the step's micro-batches so far, over all ranks (the paper's Algorithm 1).
    mode `prior_buffer`: the same, with the last step's frequencies for the slots that are still to come.
    mode `micro_batch`: of the micro-batch itself, no communication.

    `bias` [L,E] fp32 (None if `bias_update_rate` is 0) is added to the router's scores for selection only.
    After each step it rises by the rate for experts below the mean load of the global batch and falls by the
    rate for experts above it (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    Every rank must make the same calls in the same order, because they contain collectives.
    """

    def __init__(
        self,
        mode: str,
        *,
        num_layers: int,
        num_experts: int,
        micro_batches_per_step: int,
        bias_update_rate: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.counts_first = mode == "exact" and micro_batches_per_step > 1 and num_layers > 0
        self._mode = mode
        self._rate = bias_update_rate
        shape = (num_layers, num_experts)
        self.bias = torch.zeros(shape, device=device) if bias_update_rate else None
        self._prior = torch.zeros(shape, device=device)  # the last step's frequencies
        self._has_prior = False
        # of this step so far; over all ranks, but in mode micro_batch of this rank until `end_step`
        self._counts = torch.zeros(shape, device=device)

    def count_first(self, tokens_per_expert: list[Tensor]) -> None:
        """Take the [L,E] counts of all micro-batches of the step on this rank, before the first backward."""
        self._counts = _all_reduced(torch.stack(tokens_per_expert).sum(dim=0))

    def frequencies(self, tokens_per_expert: Tensor, num_slots: int) -> Tensor:
        """Frequencies [L,E] for the loss of a micro-batch with these counts [L,E].

        `num_slots` is K T, the routed slots of the global batch in one layer.
        """
        if self._mode == "micro_batch":
            self._counts += tokens_per_expert
            return expert_frequencies(tokens_per_expert)
        if not self.counts_first:
            self._counts += _all_reduced(tokens_per_expert.clone())
        seen = expert_frequencies(self._counts)
        if self._mode == "prior_buffer" and self._has_prior:
            share = self._counts.sum(dim=-1, keepdim=True) / max(num_slots, 1)
            return share * seen + (1 - share) * self._prior
        return seen

    def end_step(self) -> None:
        """After the last micro-batch of a step: update the bias and the prior, reset the counts."""
        if self._mode == "micro_batch" and self.bias is not None:
            self._counts = _all_reduced(self._counts)
        if self.bias is not None:
            self.bias += self._rate * torch.sign(self._counts.mean(dim=-1, keepdim=True) - self._counts)
        if self._mode == "prior_buffer":
            self._prior, self._has_prior = expert_frequencies(self._counts), True
        self._counts = torch.zeros_like(self._counts)

    def state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint keeps; they are equal on every rank."""
        return {"prior": self._prior, **({} if self.bias is None else {"bias": self.bias})}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned, in place."""
        self._prior.copy_(state["prior"])
        self._has_prior = bool(self._prior.any())
        if self.bias is not None:
            self.bias.copy_(state["bias"])


def _all_reduced(counts: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts
