"""What a logged step says, from sums kept on the device and one packed all-reduce: docs/monitoring.md."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loader import Loader
from moe.parallelize import dispatched
from moe.router import RouterStatistics
from trainer.config import RunConfig
from trainer.engine import DTYPES, Engine
from trainer.loss import LossShares, Totals
from trainer.optimizer import KINDS
from trainer.parallel import ParallelPlan
from trainer.runtime import Ranks
from trainer.throughput import memory_gib, peak_flops

# L MoE layers, E experts, R ranks, N kinds of parameters

HISTOGRAM_LOG2 = (-40, 8)  # |gradient| from 2^-40 to 2^8, a bin per power of two


@dataclass
class StepSums:
    """Sums over this rank's micro-batches of one step."""

    cross_entropy: Tensor  # scalar share
    mtp: Tensor  # scalar share
    balance: Tensor  # [L] shares
    z: Tensor  # [L] shares
    entropy: Tensor  # [L]
    tokens_per_expert: Tensor  # [L,E]
    logit_range: Tensor  # [L], the largest instead of a sum

    @classmethod
    def zeros(cls, num_layers: int, num_experts: int, device: torch.device) -> "StepSums":
        """Nothing seen yet."""
        layers = (num_layers,)
        shapes = [(), (), layers, layers, layers, (num_layers, num_experts), layers]
        return cls(*(torch.zeros(shape, device=device) for shape in shapes))

    def add(self, shares: LossShares, router: RouterStatistics | None) -> None:
        """Count one micro-batch."""
        self.cross_entropy += shares.cross_entropy.detach()
        self.mtp += shares.mtp.detach()
        if router is not None:
            self.balance += shares.balance.detach()
            self.z += shares.z.detach()
            self.entropy += router.entropy_sums
            self.tokens_per_expert += router.tokens_per_expert
            self.logit_range = torch.maximum(self.logit_range, router.logit_range)

    def over_ranks(self, *more: Tensor) -> "StepSums":
        """The same over all ranks, and each tensor of `more` replaced by its sum over them.

        One packed all-reduce in fp64 (counts stay exact); every rank must call it.
        """
        ranges = self.logit_range.new_zeros(dist.get_world_size(), *self.logit_range.shape)  # [R,L]
        ranges[dist.get_rank()] = self.logit_range
        sums = [*vars(self).values()]
        sums[-1] = ranges
        parts = [*sums, *more]
        packed = torch.cat([part.reshape(-1).double() for part in parts])
        dist.all_reduce(packed)
        pieces = packed.split([part.numel() for part in parts])
        totals = [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]
        for tensor, total in zip(more, totals[len(sums) :], strict=True):
            tensor.copy_(total)
        merged = StepSums(*totals[: len(sums)])
        merged.logit_range = merged.logit_range.amax(dim=0)
        return merged

    def describe(self, totals: Totals) -> dict[str, Any]:
        """The metrics of a step from sums over all ranks; `layers` holds a list of L for each."""
        values: dict[str, Any] = {"loss": float(self.cross_entropy)}
        if self.mtp:
            values["mtp_loss"] = float(self.mtp)
        if not self.tokens_per_expert.numel():
            return values
        load = self.tokens_per_expert
        shares = load / load.sum(dim=1, keepdim=True).clamp(min=1)
        layers = {
            "balance_loss": self.balance,
            "z_loss": self.z,
            "router_entropy": self.entropy / max(totals.tokens, 1),
            "max_violation": load.amax(dim=1) / load.mean(dim=1).clamp(min=1e-9) - 1,
            "effective_experts": torch.special.entr(shares).sum(dim=1).exp() / load.shape[1],
            "dead_experts": (load == 0).sum(dim=1),
            "logit_range": self.logit_range,
        }
        for key in ("balance_loss", "z_loss", "router_entropy"):
            values[key] = float(layers[key].mean())
        return values | {
            "max_violation": float(layers["max_violation"].max()),
            "effective_experts": float(layers["effective_experts"].min()),
            "dead_experts": int(layers["dead_experts"].sum()),
            "logit_range": float(layers["logit_range"].max()),
            "layers": {key: tensor.tolist() for key, tensor in layers.items()},
        }


class OptimizerNorms:
    """Squares of gradients, weights and updates by kind of parameter, taken while the optimizer steps.

    The optimizer sees flat fp32 partitions under ZeRO, in groups of one kind each, so that a sum over what
    every rank steps counts each element once; without ZeRO a sum over replicas is divided by their number.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: RunConfig, plan: ParallelPlan) -> None:
        self._armed = self._with_histograms = False
        self._old: list[tuple[int, Tensor, Tensor]] = []
        replicas = [plan.world_size // (plan.ep_size if kind == "experts" else 1) for kind in KINDS]
        self._replicas = torch.tensor(replicas if config.zero_stage == 0 else [1] * len(KINDS))
        self._max_grad_norm = config.optimizer.max_grad_norm
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def arm(self, device: torch.device, histograms: bool) -> None:
        """Measure at the next step."""
        self._armed, self._with_histograms = True, histograms
        self.squares = torch.zeros(len(KINDS), 3, device=device, dtype=torch.float64)
        first, last = HISTOGRAM_LOG2
        self.histograms = torch.zeros(len(KINDS), last - first, device=device)

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self._armed:
            return
        for group in optimizer.param_groups:
            kind = KINDS.index(group["kind"])
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                self.squares[kind, 0] += _square(parameter.grad)
                self._old.append((kind, parameter, parameter.detach().clone()))
                if self._with_histograms:
                    first, last = HISTOGRAM_LOG2
                    exponents = parameter.grad.float().abs().log2()
                    self.histograms[kind] += torch.histc(exponents, last - first, first, last)

    def _after(self, *_: Any) -> None:
        for kind, parameter, old in self._old:
            self.squares[kind, 1] += _square(old)
            self.squares[kind, 2] += _square(old.sub_(parameter.detach()))
        self._old.clear()

    def describe(self, grad_norm: float) -> dict[str, Any]:
        """The metrics by kind from sums over all ranks; `grad_norm` is the global norm before clipping."""
        self._armed = False
        squares = self.squares.cpu() / self._replicas.unsqueeze(1)
        clipped = max(1.0, (grad_norm + 1e-6) / self._max_grad_norm) if self._max_grad_norm > 0 else 1.0
        values: dict[str, Any] = {}
        for kind, (gradient, weight, update) in zip(KINDS, squares.sqrt().tolist(), strict=True):
            if weight:
                values[f"grad_norm/{kind}"] = gradient * clipped
                values[f"param_norm/{kind}"] = weight
                values[f"update_ratio/{kind}"] = update / weight
        if self._with_histograms:
            counts = self.histograms.cpu() / self._replicas.unsqueeze(1)
            values["gradient_histogram"] = {
                kind: row for kind, row in zip(KINDS, counts.tolist(), strict=True) if any(row)
            }
        return values


class Meter:
    """Gathers what a logged step says. Every rank makes the same calls: they contain collectives."""

    def __init__(
        self,
        config: RunConfig,
        plan: ParallelPlan,
        ranks: Ranks,
        engine: Engine,
        optimizer: torch.optim.Optimizer,
        loader: Loader,
        step: int,
    ) -> None:
        self._config, self._ranks, self._engine, self._loader = config, ranks, engine, loader
        self._norms = OptimizerNorms(optimizer, config, plan)
        self._ep_size = plan.ep_size
        self._peak = peak_flops(ranks.device, DTYPES[config.dtype])
        self._flops_per_token = config.model.flops_per_token(config.stage.seq_len)
        self._first_step = self._logged_step = step
        self._traffic = dispatched(engine.module)
        self._started = self._begun = time.perf_counter()
        self.due = False
        engine.clock.lap()

    def begin(self, step: int) -> None:
        """Before the work of `step`: `due` says whether it is logged, and what only then is measured."""
        self.due = step % self._config.tracker.log_every_steps == 0 or step == self._config.stage.total_steps
        self._engine.clock.measuring = self.due
        self._begun = time.perf_counter()
        if self.due:
            self._norms.arm(self._ranks.device, self._crossed(step, self._config.tracker.watch))

    def measure(
        self, step: int, sums: StepSums, totals: Totals, grad_norm: float, rate: float, save_stall: float
    ) -> dict[str, Any]:
        """The metrics of a step that is due; `save_stall` is in seconds since the last one."""
        elapsed, waits, parts = self._engine.clock.lap()
        now = time.perf_counter()
        steps, traffic = step - self._logged_step, dispatched(self._engine.module)
        busy = sum(seconds for part, seconds in parts.items() if part != "communication")
        memory = memory_gib(self._ranks.device)
        mine = [waits.get("data", 0.0) / steps, busy, *memory.values()]
        mine += [(new - old) / steps for new, old in zip(traffic, self._traffic, strict=True)]
        everywhere = torch.zeros(
            self._ranks.world_size, len(mine), dtype=torch.float64, device=self._ranks.device
        )
        everywhere[self._ranks.rank] = torch.tensor(mine, dtype=torch.float64)
        sums = sums.over_ranks(self._norms.squares, self._norms.histograms, everywhere)
        data_wait, busy_by_rank, *memories, sent, routed, received = everywhere.t().tolist()

        step_seconds = (elapsed - waits.get("evaluation", 0.0) - waits.get("save", 0.0)) / steps
        step_tokens = self._config.stage.step_tokens
        per_rank_flops = step_tokens / step_seconds * self._flops_per_token / self._ranks.world_size
        per_step = (now - self._started) / (step - self._first_step)
        metrics = {
            "step": step,
            "tokens": step * step_tokens,
            **sums.describe(totals),
            "grad_norm": grad_norm,
            **self._norms.describe(grad_norm),
            "learning_rate": rate,
            "tokens_per_second": step_tokens / step_seconds,
            "tokens_per_second_mean": step_tokens / per_step,
            "eta_seconds": per_step * (self._config.stage.total_steps - step),
            "step_seconds": step_seconds,
            "data_wait_seconds": max(data_wait),
            "save_stall_seconds": save_stall,
            **{f"{part}_seconds": seconds for part, seconds in parts.items()},
            "other_seconds": max(0.0, now - self._begun - sum(parts.values())),
            "stall_fraction": max(data_wait) / step_seconds,
            "slowest_rank": max(range(len(busy_by_rank)), key=busy_by_rank.__getitem__),
            "straggling": max(busy_by_rank) / max(torch.tensor(busy_by_rank).median().item(), 1e-9) - 1,
            "padding": 1 - totals.tokens / step_tokens,
            "tflops": per_rank_flops / 1e12,
            "mfu": per_rank_flops / self._peak,
            **{key: max(values) for key, values in zip(memory, memories, strict=True)},
            **self._describe_dispatch(sent, routed, received),
            "sources": self._loader.seen(),
        }
        if sums.tokens_per_expert.numel() and self._crossed(
            step, self._config.tracker.expert_load_every_steps
        ):
            metrics["tokens_per_expert"] = sums.tokens_per_expert.long().tolist()
        self._logged_step, self._traffic = step, traffic
        return metrics

    def _describe_dispatch(
        self, sent: list[float], routed: list[float], received: list[float]
    ) -> dict[str, Any]:
        """From [R] bytes sent, slots routed and slots received, per step."""
        if not sum(routed):
            return {}
        by_ep_rank = [received[rank :: self._ep_size] for rank in range(self._ep_size)]
        return {
            "dispatch_gib": sum(sent) / len(sent) / 2**30,
            "received_slots": [sum(values) / len(values) for values in by_ep_rank],
            "received_imbalance": max(received) * len(received) / sum(received) - 1,
            "drop_fraction": 1 - sum(received) / sum(routed),
        }

    def _crossed(self, step: int, every: int) -> bool:
        """Whether a multiple of `every` lies between the last logged step and this one; 0 = never."""
        return every > 0 and step // every > self._logged_step // every


def perplexities(losses: dict[str, float]) -> dict[str, float]:
    """{"loss/x": nats per token} -> {"perplexity/x": ...}"""
    return {f"perplexity{key.removeprefix('loss')}": math.exp(min(loss, 700)) for key, loss in losses.items()}


def _square(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32).square()
