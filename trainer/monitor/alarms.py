"""Alarms: logged metrics that a person should look at now, and what to do about them."""

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.loader import Batch
from trainer.engine.optimizer import kind_of
from trainer.ranks.runtime import Ranks
from trainer.settings.config import AlarmsConfig

_WINDOW, _LEAST = 50, 10  # the loss is compared with up to 50 logged losses, and with no fewer than 10
_COLLAPSES = 10  # consecutive logged steps after warmup in which a layer uses too few experts
_RECENT = 10  # logged steps over which rewards and lengths are averaged
_FLAT = 5  # consecutive logged steps in which no group has two different rewards
_FAILED = 0.25  # share of checks
_STRAGGLES = 3  # consecutive logged steps in which the same rank is the slowest


class Alarm(NamedTuple):
    """One reason to look at a run."""

    kind: str
    text: str  # what is wrong, and what to do


class Alarms:
    """Checks the metrics of logged steps. `hosts` is indexed by rank."""

    def __init__(self, config: AlarmsConfig, hosts: list[str], warmup_steps: int = 0) -> None:
        self._config, self._hosts, self._warmup_steps = config, hosts, warmup_steps
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._slow = (-1, 0)  # the slowest rank, and for how many logged steps it has been so
        self._collapsed = Counter[int]()  # layer -> logged steps after warmup with too few experts in a row
        self._rewards: deque[float] = deque(maxlen=_RECENT)
        self._best_reward = 0.0  # the highest mean of _RECENT logged steps
        self._lengths: deque[float] = deque(maxlen=_WINDOW)
        self._flat = 0  # logged steps in a row in which all groups were flat
        self._raised: dict[str, int] = {}  # kind -> step

    def check(self, metrics: dict[str, Any]) -> list[Alarm]:
        """The alarms that a logged step raises, each kind at most once in `repeat_after_steps` steps.

        The collapse of a layer is raised once, and again only after the layer has recovered.
        """
        step, loud = metrics["step"], metrics["step"] - self._config.repeat_after_steps
        due = [alarm for alarm in self._found(metrics) if self._raised.get(alarm.kind, loud) <= loud]
        self._raised |= {alarm.kind: step for alarm in due}
        return due + list(self._collapses(metrics))

    def _collapses(self, metrics: dict[str, Any]) -> Iterator[Alarm]:
        """The layers that have just used too few experts for long enough: each once, until it recovers."""
        for layer, share in enumerate(metrics.get("layers", {}).get("effective_experts", [])):
            if metrics["step"] <= self._warmup_steps or share >= self._config.effective_experts:
                self._collapsed[layer] = 0
                continue
            self._collapsed[layer] += 1
            if self._collapsed[layer] == _COLLAPSES:
                yield Alarm(
                    "expert collapse",
                    f"sparse layer {layer} works as if it had {share:.0%} of its experts "
                    f"({metrics['layers']['dead_experts'][layer]} without a token) in {_COLLAPSES} logged "
                    "steps. Raise model.router_aux_loss_coef, set balance.bias_update_rate, look for "
                    "one-sided data",
                )

    def _found(self, metrics: dict[str, Any]) -> Iterator[Alarm]:
        limits, loss, before = self._config, metrics["loss"], np.array(self._losses)
        self._losses.append(loss)
        if "reward" in metrics:
            yield from self._of_rewards(metrics)
        elif len(before) >= _LEAST:  # the z-score of the loss against the line through those before it
            at = np.arange(len(before))
            slope, start = np.polyfit(at, before, 1)
            expected = start + slope * len(before)
            z = (loss - expected) / max(float(np.std(before - start - slope * at)), 1e-3 * abs(expected))
            if z > limits.loss_spike:
                yield Alarm(
                    "loss spike",
                    f"the loss is {loss:.3f}, {z:.1f} deviations above the trend of the steps before. If it "
                    "stays high: look at the rows of the step (python -m data_pipeline inspect), leave them "
                    "out (data.skip) or lower optimizer.lr, and continue from an earlier checkpoint",
                )
        if metrics["stall_fraction"] > limits.data_stall:
            yield Alarm(
                "data stall",
                f"{metrics['stall_fraction']:.1%} of a step is spent waiting for data "
                f"({metrics['data_wait_seconds']:.3f} s). Put data.dir on a faster disk, or free CPU cores",
            )
        rank = metrics["slowest_rank"] if metrics["straggling"] > limits.straggler else -1
        self._slow = (rank, self._slow[1] + 1 if rank == self._slow[0] else 1)
        if rank >= 0 and self._slow[1] >= _STRAGGLES:
            yield Alarm(
                "straggler",
                f"rank {rank} on {self._hosts[rank]} computes {metrics['straggling']:.0%} longer than the "
                f"median in {self._slow[1]} consecutive logged steps, and all others wait for it. Check the "
                "clocks, the temperature and other processes of its device, or exclude the node; if "
                "received_imbalance is high, its experts get too many tokens",
            )

    def _of_rewards(self, metrics: dict[str, Any]) -> Iterator[Alarm]:
        self._rewards.append(metrics["reward"])
        self._lengths.append(metrics["completion_tokens"])
        mean = fmean(self._rewards)
        if len(self._rewards) == _RECENT:
            self._best_reward = max(self._best_reward, mean)
        if mean < self._best_reward / 2:
            yield Alarm(
                "reward collapse",
                f"the mean reward of {_RECENT} logged steps is {mean:.3f}; it was {self._best_reward:.3f}. "
                "Read the samples, go back to an earlier checkpoint, lower optimizer.lr or raise rl.kl_coef",
            )
        lengths = list(self._lengths)
        if len(lengths) >= 2 * _RECENT and fmean(lengths[-_RECENT:]) > 2 * fmean(lengths[:_RECENT]):
            yield Alarm(
                "lengths",
                f"completions have {fmean(lengths[-_RECENT:]):.0f} tokens, more than twice as many as "
                f"{len(lengths)} logged steps ago ({metrics['truncated']:.0%} are truncated). Read them, "
                "use rl.overlong=penalise, or rl.loss_sum=constant, which does not favour length",
            )
        if metrics["failed_checks"] > _FAILED:
            yield Alarm(
                "failed checks",
                f"{metrics['failed_checks']:.0%} of the checks raised, took too long or gave no number from "
                "0 to 1, and count as 0. logs/ names prompts and reasons: mend the verifier, its options or "
                "the rows",
            )
            return
        self._flat = self._flat + 1 if metrics["flat_groups"] == 1 else 0
        if self._flat >= _FLAT:
            yield Alarm(
                "no signal",
                f"in {_FLAT} logged steps all completions of a prompt had the same reward (mean {mean:.3f}): "
                "nothing is learned. Choose prompts of another difficulty, raise rl.group_size or the "
                "temperature",
            )


def diverged(
    step: int, micro_batches: list[Batch], losses: list[Tensor], first: list[str], ranks: Ranks, run_dir: Path
) -> str:
    """Say which ranks and rows made the loss of a step infinite or NaN; every rank must call it."""
    rows = [batch.rows for batch, loss in zip(micro_batches, losses, strict=True) if not torch.isfinite(loss)]
    here = [*(f"rows {list(row)}" for row in rows), *(f"first {what}" for what in first)]
    everywhere: list = [None] * ranks.world_size
    dist.all_gather_object(everywhere, here)
    where = "; ".join(f"rank {rank}, {what}" for rank, found in enumerate(everywhere) for what in found)
    return (
        f"the gradient is not finite at step {step} ({where}); the last checkpoint is unharmed. "
        f"Look at these rows, or start a run with a lower optimizer.lr from its weights: "
        f"stage.init_from={run_dir}/checkpoints/.../hf"
    )


@contextmanager
def first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """A list that receives the first parameter whose gradient, in a backward pass inside, is not finite.

    The pass goes from the loss to the embedding, so this is the parameter nearest to the loss. Weights that
    are not finite are reported instead.
    """
    found: list[str] = []

    def look(tensor: Tensor, name: str, what: str = "gradient") -> None:
        if not found and not torch.isfinite(tensor).all():
            found.append(f"the {what} of the {kind_of(name)} ({name})")

    handles = []
    for name, parameter in model.named_parameters():
        look(parameter, name, "weights")
        handles.append(parameter.register_hook(partial(look, name=name)))
    yield found
    for handle in handles:
        handle.remove()
