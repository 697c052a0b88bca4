"""The loss of a step as a sum of shares.

Rule of shares: every term given to `backward` is this rank's share of this micro-batch, normalised by a total
of the global batch; shares add up, over ranks and micro-batches, to the loss of the global batch, however it
was cut.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loader import Batch
from moe.balance import balance_loss_share, expert_frequencies
from moe.model import ModelOutput
from trainer.settings.config import RunConfig


@dataclass(frozen=True)
class Totals:
    """Sums over the global batch of one step, and what the ranks agree on at its start."""

    label_tokens: int  # tokens with a label
    tokens: int  # tokens that are not padding
    stop: bool  # any rank was asked to stop
    written: bool  # all ranks have written their part of a checkpoint


def agree_on_totals(micro_batches: list[Batch], stop: bool, written: bool = False) -> Totals:
    """One all-reduce of four integers; every rank must call it once a step.

    They travel between the hosts, so that nobody waits for a device that still works on the last step.
    """
    counts = [sum(batch.label_tokens for batch in micro_batches)]
    counts += [sum(batch.tokens for batch in micro_batches), int(stop), int(written)]
    packed = torch.tensor(counts, dtype=torch.int64)
    dist.all_reduce(packed)
    label_tokens, tokens, stops, writers = packed.tolist()
    return Totals(label_tokens, tokens, stops > 0, writers == dist.get_world_size())


@dataclass(frozen=True)
class LossShares:
    """The terms of one micro-batch's loss: scalars, fp32, already shares of the global batch."""

    cross_entropy: Tensor
    balance: Tensor  # [L], before its weight
    local_balance: Tensor  # [L], with the frequencies of this micro-batch alone, before its weight
    z: Tensor  # [L], before its weight
    mtp: Tensor  # of multi-token prediction, before its weight; 0 without it

    def total(self, config: RunConfig) -> Tensor:
        """What `backward` takes."""
        balance = self.balance.sum() + config.balance.micro_weight * self.local_balance.sum()
        loss = self.cross_entropy + config.mtp_loss_scaling_factor * self.mtp
        return loss + config.model.router_aux_loss_coef * balance + config.balance.z_loss_coef * self.z.sum()


def loss_shares(output: ModelOutput, frequencies: Tensor | None, totals: Totals) -> LossShares:
    """Shares of one micro-batch; a dense model has no balance and no z-loss."""
    assert output.cross_entropy_sum is not None
    ahead, router = output.mtp_cross_entropy_sum, output.router
    cross_entropy = output.cross_entropy_sum / max(totals.label_tokens, 1)
    nothing = cross_entropy.new_zeros(0)
    mtp = nothing.sum() if ahead is None else ahead / max(totals.label_tokens, 1)
    if router is None or frequencies is None:
        return LossShares(cross_entropy, nothing, nothing, nothing, mtp)
    tokens = max(totals.tokens, 1)
    local = expert_frequencies(router.tokens_per_expert)
    return LossShares(
        cross_entropy,
        balance_loss_share(frequencies, router.probability_sums, tokens),
        balance_loss_share(local, router.probability_sums, tokens),
        router.z_sums / tokens,
        mtp,
    )
