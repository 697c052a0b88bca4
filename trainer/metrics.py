"""What a logged step says, from sums kept on the device and one packed all-reduce."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe.router import RouterStatistics
from trainer.loss import LossShares, Totals

# L MoE layers, E experts


@dataclass
class StepSums:
    """Sums over this rank's micro-batches of one step."""

    cross_entropy: Tensor  # scalar share
    balance: Tensor  # [L] shares
    z: Tensor  # [L] shares
    entropy: Tensor  # [L]
    tokens_per_expert: Tensor  # [L,E]

    @classmethod
    def zeros(cls, num_layers: int, num_experts: int, device: torch.device) -> "StepSums":
        """Nothing seen yet."""
        shapes = [(), (num_layers,), (num_layers,), (num_layers,), (num_layers, num_experts)]
        return cls(*(torch.zeros(shape, device=device) for shape in shapes))

    def add(self, shares: LossShares, router: RouterStatistics | None) -> None:
        """Count one micro-batch."""
        self.cross_entropy += shares.cross_entropy.detach()
        if router is not None:
            self.balance += shares.balance.detach()
            self.z += shares.z.detach()
            self.entropy += router.entropy_sums
            self.tokens_per_expert += router.tokens_per_expert

    def over_ranks(self) -> "StepSums":
        """The same sums over all ranks: one packed all-reduce; every rank must call it."""
        parts = [self.cross_entropy, self.balance, self.z, self.entropy, self.tokens_per_expert]
        packed = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(packed)
        split = packed.split([part.numel() for part in parts])
        return StepSums(*(piece.view_as(part) for piece, part in zip(split, parts, strict=True)))

    def describe(self, totals: Totals) -> dict[str, float]:
        """The metrics of a step from sums over all ranks."""
        values = {"loss": float(self.cross_entropy)}
        if self.tokens_per_expert.numel():
            load = self.tokens_per_expert
            violation = load.amax(dim=1) / load.mean(dim=1).clamp(min=1e-9) - 1
            values |= {
                "balance_loss": float(self.balance.mean()),
                "z_loss": float(self.z.mean()),
                "router_entropy": float(self.entropy.mean()) / max(totals.tokens, 1),
                "max_violation": float(violation.max()),
                "dead_experts": int((load == 0).sum()),
            }
        return values
