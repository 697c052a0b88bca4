"""Metrics of a logged step, from sums kept on the device and one packed all-reduce: docs/monitoring.md."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe.parallelize import dispatched
from moe.router import RouterStatistics
from trainer.engine.engine import Engine
from trainer.engine.loss import LossShares, Totals
from trainer.engine.optimizer import KINDS, RULES
from trainer.monitor.hardware import memory_gib, peak_flops
from trainer.ranks.runtime import DTYPES, Ranks
from trainer.settings.config import RunConfig
from trainer.settings.parallel import ParallelPlan

# L MoE layers, E experts, R ranks, N kinds of parameters

_OF_THE_LOOP = ("data", "evaluation", "save")  # waits with metrics of their own; the others are the stage's
SLICE = 2**24  # elements processed at once, which takes a few times 64 MiB
HISTOGRAM_LOG2 = (-40, 8)  # |gradient| from 2^-40 to 2^8, a bin per power of two


class StepSums(NamedTuple):
    """Sums over this rank's micro-batches of one step."""

    cross_entropy: Tensor  # scalar share
    mtp: Tensor  # scalar share
    balance: Tensor  # [L] shares
    z: Tensor  # [L] shares
    entropy: Tensor  # [L]
    tokens_per_expert: Tensor  # [L,E]
    logit_range: Tensor  # [L], the maximum instead of a sum

    @classmethod
    def zeros(cls, num_layers: int, num_experts: int, device: torch.device) -> "StepSums":
        """Sums before the first micro-batch."""
        shapes: dict[str, tuple[int, ...]] = {"cross_entropy": (), "mtp": ()}
        shapes["tokens_per_expert"] = num_layers, num_experts
        return cls(**{name: torch.zeros(shapes.get(name, num_layers), device=device) for name in cls._fields})

    def add(self, shares: LossShares, router: RouterStatistics | None) -> None:
        """Add one micro-batch."""
        self.cross_entropy.add_(shares.cross_entropy.detach())
        self.mtp.add_(shares.mtp.detach())
        if router is not None:
            self.balance.add_(shares.balance.detach())
            self.z.add_(shares.z.detach())
            self.entropy.add_(router.entropy_sums)
            self.tokens_per_expert.add_(router.tokens_per_expert)
            self.logit_range.clamp_(min=router.logit_range)

    def over_ranks(self, *more: Tensor) -> "StepSums":
        """Return these sums over all ranks, and replace each tensor of `more` by its sum over all ranks.

        One packed all-reduce in fp64 (counts stay exact); every rank must call it.
        """
        summed = [name for name in self._fields if name != "logit_range"]
        ranges = self.logit_range.new_zeros(dist.get_world_size(), len(self.logit_range))  # [R,L]
        ranges[dist.get_rank()] = self.logit_range
        parts = [*more, *(getattr(self, name) for name in summed), ranges]
        packed = torch.cat([part.reshape(-1).double() for part in parts])
        dist.all_reduce(packed)
        pieces = packed.split([part.numel() for part in parts])
        totals = [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]
        for tensor, total in zip(more, totals, strict=False):
            tensor.copy_(total)
        *sums, ranges = totals[len(more) :]
        return StepSums(**dict(zip(summed, sums, strict=True)), logit_range=ranges.amax(dim=0))

    def describe(self, totals: Totals) -> dict[str, Any]:
        """The metrics of a step from sums over all ranks; `layers` holds L values of each layer metric."""
        loss = {"loss": self.cross_entropy.item()}
        if self.mtp:
            loss["mtp_loss"] = self.mtp.item()
        load = self.tokens_per_expert
        if not load.numel():
            return loss
        shares = load / load.sum(dim=1, keepdim=True).clamp(min=1)
        layers: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
            "balance_loss": (torch.mean, self.balance),
            "z_loss": (torch.mean, self.z),
            "router_entropy": (torch.mean, self.entropy / max(totals.tokens, 1)),
            "max_violation": (torch.max, load.amax(dim=1) / load.mean(dim=1).clamp(min=1e-9) - 1),
            "effective_experts": (torch.min, torch.special.entr(shares).sum(dim=1).exp() / load.shape[1]),
            "dead_experts": (torch.sum, (load == 0).sum(dim=1)),
            "logit_range": (torch.max, self.logit_range),
        }
        over_layers = {key: reduce(values).item() for key, (reduce, values) in layers.items()}
        return loss | over_layers | {"layers": {key: values.tolist() for key, (_, values) in layers.items()}}


class OptimizerNorms:
    """Sums of squared gradients, weights and updates by kind of parameter, measured as the optimizer steps.

    Under ZeRO the optimizer holds flat fp32 partitions in groups of one kind each, so that a sum over all
    ranks counts each element once; without ZeRO the sum over replicas is divided by their number. A partition
    may fill much of a GPU, so it is never copied: the update is computed from the states after the step,
    slice by slice.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: RunConfig, plan: ParallelPlan) -> None:
        self._armed = self._with_histograms = False
        self._rule = RULES[type(optimizer)]
        replicas = [plan.world_size // (plan.ep_size if kind == "experts" else 1) for kind in KINDS]
        self._replicas = torch.tensor(replicas if config.zero_stage == 0 else [1] * len(KINDS))
        self._max_grad_norm = config.optimizer.max_grad_norm
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def arm(self, device: torch.device, histograms: bool) -> None:
        """Measure the next step; the sums are on `device`, even if the optimizer's states are not."""
        self._armed, self._with_histograms = True, histograms
        self.squares = torch.zeros(len(KINDS), 3, device=device, dtype=torch.float64)
        self.histograms = torch.zeros(len(KINDS), HISTOGRAM_LOG2[1] - HISTOGRAM_LOG2[0], device=device)

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group, parameter in self._stepped(optimizer):
            kind = KINDS.index(group["kind"])
            _add(self.squares[kind, 1], _square(parameter.detach()))

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group, parameter in self._stepped(optimizer):
            kind, state = KINDS.index(group["kind"]), optimizer.state[parameter]
            _add(self.squares[kind, 0], _square(parameter.grad))  # clipped by now in every case
            for part in parameter.grad.flatten().split(SLICE) if self._with_histograms else ():
                _add(self.histograms[kind], _histogram(part))
            tensors = (parameter.grad, parameter.detach(), *(state[name] for name in self._rule.states))
            for parts in zip(*(tensor.flatten().split(SLICE) for tensor in tensors), strict=True):
                _add(self.squares[kind, 2], _square(self._rule.change(group, state.get("step"), *parts)))

    def _stepped(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], Any]]:
        """Yield group and parameter of each update, if this step is measured."""
        for group in optimizer.param_groups if self._armed else ():
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield group, parameter

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
            counts = (self.histograms.cpu() / self._replicas.unsqueeze(1)).tolist()
            rows = zip(KINDS, counts, strict=True)
            values["gradient_histogram"] = {kind: row for kind, row in rows if any(row)}
        return values


class Meter:
    """Collects the metrics of logged steps. Every rank makes the same calls, which contain collectives."""

    def __init__(
        self, config: RunConfig, ranks: Ranks, engine: Engine, optimizer: torch.optim.Optimizer, step: int
    ) -> None:
        self._config, self._ranks, self._engine = config, ranks, engine
        self._plan = config.plan(ranks.world_size)
        self._norms = OptimizerNorms(optimizer, config, self._plan)
        self._peak = peak_flops(ranks.device, DTYPES[config.dtype])
        self._flops_per_token = config.model.flops_per_token(config.stage.seq_len)
        self._first_step = self._logged_step = step
        self._positions = 0  # since the last logged step
        self._traffic = dispatched(engine.module)
        self._started = self._begun = time.perf_counter()
        self.due = False
        engine.clock.lap()

    def begin(self, step: int) -> None:
        """Call before the work of `step`: sets `due`, and prepares the measurements if the step is logged."""
        self.due = step % self._config.tracker.log_every_steps == 0 or step == self._config.stage.total_steps
        self._engine.clock.measuring = self.due
        self._begun = time.perf_counter()
        if self.due:
            self._norms.arm(self._ranks.device, self._crossed(step, self._config.tracker.watch))

    def add(self, totals: Totals) -> None:
        """Call once a step with its totals."""
        self._positions += totals.positions

    def measure(
        self, step: int, sums: StepSums, totals: Totals, grad_norm: float, rate: float, save_stall: float
    ) -> dict[str, Any]:
        """The metrics of a step that is due; `save_stall`: seconds of saving since the last such step."""
        elapsed, waits, parts = self._engine.clock.lap()
        now = time.perf_counter()
        steps, traffic = step - self._logged_step, dispatched(self._engine.module)
        busy = sum(seconds for part, seconds in parts.items() if part != "communication")
        memory = memory_gib(self._ranks.device)
        mine = [waits.get("data", 0.0) / steps, busy, *memory.values()]
        mine += [(new - old) / steps for new, old in zip(traffic, self._traffic, strict=True)]
        everywhere = self._norms.squares.new_zeros(self._plan.world_size, len(mine))  # [R,...]
        everywhere[self._ranks.rank] = everywhere.new_tensor(mine)
        sums = sums.over_ranks(self._norms.squares, self._norms.histograms, everywhere)
        data_wait, busy_by_rank, *memories, sent, routed, received = everywhere.t().tolist()

        step_seconds = (elapsed - waits.get("evaluation", 0.0) - waits.get("save", 0.0)) / steps
        step_tokens, total_steps = self._config.stage.step_tokens, self._config.stage.total_steps
        speed = self._positions / steps / step_seconds
        per_rank_flops = speed * self._flops_per_token / self._plan.world_size
        of_stage = {name: of / steps for name, of in waits.items() if name not in _OF_THE_LOOP}
        training = step_seconds - sum(of_stage.values())
        per_step = (now - self._started) / (step - self._first_step)
        metrics = {
            "step": step,
            "tokens": step * step_tokens,
            **sums.describe(totals),
            "grad_norm": grad_norm,
            **self._norms.describe(grad_norm),
            "learning_rate": rate,
            "tokens_per_second": speed,
            "tokens_per_second_mean": step_tokens / per_step,
            "eta_seconds": per_step * (total_steps - step),
            "step_seconds": step_seconds,
            "data_wait_seconds": max(data_wait),
            "save_stall_seconds": save_stall,
            **{f"{part}_seconds": seconds for part, seconds in parts.items()},
            **{f"{name}_seconds": seconds for name, seconds in of_stage.items()},
            **({"trained_tokens_per_second": speed * step_seconds / training} if of_stage else {}),
            "other_seconds": max(0.0, now - self._begun - sum(parts.values())),
            "stall_fraction": max(data_wait) / step_seconds,
            "slowest_rank": max(range(len(busy_by_rank)), key=busy_by_rank.__getitem__),
            "straggling": max(busy_by_rank) / max(torch.tensor(busy_by_rank).median().item(), 1e-9) - 1,
            "padding": 1 - totals.tokens / totals.positions,
            "tflops": per_rank_flops / 1e12,
            "mfu": per_rank_flops / self._peak,
            **{key: max(values) for key, values in zip(memory, memories, strict=True)},
            **self._describe_dispatch(sent, routed, received),
        }
        due = self._crossed(step, self._config.tracker.expert_load_every_steps)
        if due and sums.tokens_per_expert.numel():
            metrics["tokens_per_expert"] = sums.tokens_per_expert.long().tolist()
        self._logged_step, self._traffic, self._positions = step, traffic, 0
        return metrics

    def _describe_dispatch(self, sent: list, routed: list, received: list) -> dict[str, Any]:
        """Dispatch metrics from bytes sent, slots routed and slots received per step, each [R]."""
        if not sum(routed):
            return {}
        by_ep_rank = [received[rank :: self._plan.ep_size] for rank in range(self._plan.ep_size)]
        return {
            "dispatch_gib": sum(sent) / len(sent) / 2**30,
            "received_slots": [sum(values) / len(values) for values in by_ep_rank],
            "received_imbalance": max(received) * len(received) / sum(received) - 1,
            "drop_fraction": 1 - sum(received) / sum(routed),
        }

    def _crossed(self, step: int, every: int) -> bool:
        """Whether a multiple of `every` lies between the last logged step and this one; 0 = never."""
        return every > 0 and step // every > self._logged_step // every


def _add(total: Tensor, value: Tensor) -> None:
    """Add in place a value that may be on another device."""
    total += value.to(total.device, non_blocking=True)


def _square(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32).square()


def _histogram(gradient: Tensor) -> Tensor:
    """How many values lie in each bin of HISTOGRAM_LOG2. (torch.histc is not deterministic on CUDA.)"""
    first, last = HISTOGRAM_LOG2
    exponents = gradient.float().abs().log2_().floor_().nan_to_num_(nan=first - 1).clamp_(first - 1, last)
    bins = exponents.long().sub_(first - 1)  # the first and the last bin hold all values out of range
    return torch.bincount(bins.flatten(), minlength=last - first + 2)[1:-1]
