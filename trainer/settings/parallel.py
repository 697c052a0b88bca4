"""The layout of ranks, rows and experts. Pure arithmetic, torch-free."""

from dataclasses import dataclass
from typing import Literal

from trainer.settings.typed import AtLeast1


@dataclass
class ParallelConfig:
    """How the ranks are laid out."""

    nproc_per_node: int
    ep_size: int
    ep_within_node: bool
    dispatcher: Literal["all_to_all", "deduplicated"]
    dispatch_chunks: AtLeast1


@dataclass(frozen=True)
class ParallelPlan:
    """The layout of one run over `world_size` ranks.

    Every rank is a data-parallel rank. Expert-parallel groups are `ep_size` consecutive ranks, so that a
    group can stay inside a node; expert-data-parallel groups hold every ep_size-th rank.
    """

    world_size: int
    ep_size: int
    micro_batch_size: int
    global_batch_size: int

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of one rank in one optimizer step."""
        return self.global_batch_size // (self.world_size * self.micro_batch_size)

    def ep_rank(self, rank: int) -> int:
        """Position of `rank` in its expert-parallel group."""
        return rank % self.ep_size

    def groups_across_nodes(self, hosts: list[str]) -> list[str]:
        """Expert-parallel groups whose ranks do not share a host, as text; `hosts` is indexed by rank."""
        found = []
        for first in range(0, self.world_size, self.ep_size):
            names = sorted(set(hosts[first : first + self.ep_size]))
            if len(names) > 1:
                found.append(f"ranks {first}-{first + self.ep_size - 1} on {', '.join(names)}")
        return found

    def problems(self, num_experts: int) -> list[str]:
        """Every broken rule of the layout, one line each."""
        ranks, experts = self.world_size, f"parallel.ep_size={self.ep_size}"
        sizes = {
            "number of ranks (parallel.nproc_per_node x nodes)": ranks,
            "parallel.ep_size": self.ep_size,
            "micro_batch_size": self.micro_batch_size,
            "stage.global_batch_size": self.global_batch_size,
        }
        if found := [f"{key}={value} must be above 0" for key, value in sizes.items() if value < 1]:
            return found
        if ranks % self.ep_size:
            found.append(f"{experts} does not divide the {ranks} ranks; use {_listed(ranks)}")
        if num_experts == 0 and self.ep_size > 1:
            found.append(f"{experts} needs experts, but model.num_experts=0; use 1")
        elif num_experts % self.ep_size:
            divisors = _listed(num_experts)
            found.append(f"{experts} does not divide model.num_experts={num_experts}; use {divisors}")
        if self.global_batch_size % (ranks * self.micro_batch_size):
            found.append(
                f"stage.global_batch_size={self.global_batch_size} is not a multiple of {ranks} ranks x "
                f"micro_batch_size={self.micro_batch_size}; use a multiple of {ranks * self.micro_batch_size}"
            )
        return found


def _listed(number: int) -> str:
    """The divisors of a number up to 4096 as text, at most 12."""
    divisors = [d for d in range(1, min(number, 4096) + 1) if number % d == 0]
    return ", ".join(map(str, divisors[:12])) + (", ..." if len(divisors) > 12 else "")
