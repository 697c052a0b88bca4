"""The loss of a step as a sum of shares.

Rule of shares: every term given to `backward` is the share of one micro-batch on one rank, divided by a total
of the global batch. Over all ranks and micro-batches the shares add up to the loss of the global batch,
however the batch is divided.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loader import Batch
from moe.balance import Balance, balance_loss_share, expert_frequencies
from moe.model import ModelOutput
from trainer.settings.config import RunConfig
from trainer.settings.parallel import ParallelPlan


@dataclass(frozen=True)
class Totals:
    """Sums over the global batch of one step, and what the ranks agree on at its start."""

    label_tokens: int  # tokens with a label
    tokens: int  # tokens that are not padding
    positions: int  # tokens and padding
    stop: bool  # any rank was asked to stop
    written: bool  # all ranks have written their part of a checkpoint


def agree_on_totals(micro_batches: list[Batch], stop: bool, written: bool = False) -> Totals:
    """One all-reduce of five integers; every rank must call it once a step.

    The integers are in host memory, so that no rank waits for a device that still computes the last step.
    """
    counts = [sum(batch.label_tokens for batch in micro_batches)]
    counts.append(sum(batch.tokens for batch in micro_batches))
    counts.append(sum(sum(batch.lengths) for batch in micro_batches))
    counts += [int(stop), int(written)]
    packed = torch.tensor(counts, dtype=torch.int64)
    dist.all_reduce(packed)
    label_tokens, tokens, positions, stops, writers = packed.tolist()
    return Totals(label_tokens, tokens, positions, stops > 0, writers == dist.get_world_size())


@dataclass(frozen=True)
class LossShares:
    """The terms of one micro-batch's loss in fp32, already shares of the global batch; [L] or scalars."""

    cross_entropy: Tensor
    balance: Tensor  # [L], before its weight
    local_balance: Tensor  # [L], from the frequencies of this micro-batch alone, before its weight
    z: Tensor  # [L], before its weight
    mtp: Tensor  # of multi-token prediction, before its weight; 0 without it

    @classmethod
    def of(
        cls, cross_entropy: Tensor, output: ModelOutput, frequencies: Tensor | None, totals: Totals
    ) -> "LossShares":
        """The terms of a micro-batch: `cross_entropy`, already a share, and terms from the model's output.

        A dense model has no balance loss and no z-loss.
        """
        ahead, router = output.mtp_cross_entropy_sum, output.router
        nothing = cross_entropy.new_zeros(0)
        mtp = nothing.sum() if ahead is None else ahead / max(totals.label_tokens, 1)
        if router is None or frequencies is None:
            return cls(cross_entropy, nothing, nothing, nothing, mtp)
        tokens = max(totals.tokens, 1)
        local = expert_frequencies(router.tokens_per_expert)
        return cls(
            cross_entropy,
            balance_loss_share(frequencies, router.probability_sums, tokens),
            balance_loss_share(local, router.probability_sums, tokens),
            router.z_sums / tokens,
            mtp,
        )

    def total(self, config: RunConfig) -> Tensor:
        """The weighted sum of the terms, for `backward`."""
        balance = self.balance.sum() + config.balance.micro_weight * self.local_balance.sum()
        loss = self.cross_entropy + config.mtp_loss_scaling_factor * self.mtp
        return loss + config.model.router_aux_loss_coef * balance + config.balance.z_loss_coef * self.z.sum()


# batch, its output, frequencies [L,E] of the balance loss (None: a dense model), totals of the step
LossFunction = Callable[[Batch, ModelOutput, Tensor | None, Totals], LossShares]


def build_balance(config: RunConfig, plan: ParallelPlan, device: torch.device) -> Balance:
    """The expert frequencies and the selection bias of a run."""
    return Balance(
        config.balance.mode,
        num_layers=config.model.num_moe_layers,
        num_experts=config.model.num_experts,
        micro_batches_per_step=plan.gradient_accumulation_steps,
        bias_update_rate=config.balance.bias_update_rate,
        device=device,
    )
