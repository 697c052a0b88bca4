"""Reinforcement learning with verifiable rewards: sample completions, check them, learn from the rewards.

Sampling runs in the model that is trained, with its own weights, kernels and ranks, so that the probability
that a token had when it was sampled is the one that the loss computes. See docs/rl.md.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from statistics import fmean, pstdev
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loader import Batch
from data_pipeline.manifest import SPLITS
from data_pipeline.prompts import Prompts
from moe.balance import Balance
from moe.config import ConfigError
from moe.model import CausalLM, ModelOutput
from trainer.engine.engine import Engine
from trainer.engine.loss import LossShares, Totals
from trainer.engine.policy import SUMS, PolicyBatch, policy_loss
from trainer.ranks.runtime import Ranks
from trainer.settings.config import RunConfig
from trainer.stages.completer import Completer
from trainer.stages.completions import Completion, StepCompletions
from trainer.stages.stage import BuildModel

SHOWN = 12  # completions of a logged step for people to read


def check_lengths(config: RunConfig) -> None:
    """Raises ConfigError if a prompt, held out or not, has more than rl.max_prompt_tokens."""
    assert config.rl is not None
    for name in sorted(config.data.trained_sources()):
        for split in SPLITS:
            with Prompts(config.data, seed=config.seed, split=split, source=name) as prompts:
                longest = prompts.longest()
            if longest > (limit := config.rl.max_prompt_tokens):
                law = f"data.sources.{name}: a prompt has {longest} tokens, but rl.max_prompt_tokens={limit}"
                raise ConfigError(f"{law}; raise it, or leave out long prompts with data.max_chat_tokens")


class Reinforced:
    """A `Stage` that learns from its own completions of the run's prompts.

    A phase samples the completions of `rl.updates` steps with the weights of its first step. Every rank then
    holds all of them, so that a checkpoint inside a phase restores on any layout.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        engine: Engine,
        balance: Balance,
        step: int,
        state: dict[str, Any],
        build_model: BuildModel,
    ) -> None:
        assert config.rl is not None
        self._config, self._rl, self._ranks, self._step = config, config.rl, ranks, step
        self._engine, self._balance = engine, balance
        self._prompts = Prompts(config.data, seed=config.seed)
        self._groups = config.stage.global_batch_size // self._rl.group_size  # prompts of a step
        self._prompts.check_budget(config.stage.total_steps * self._groups)
        check_lengths(config)
        self._completer = Completer(config, ranks, engine.apply, self._around)
        self._phase = [Completion(**one) for one in state.get("completions", [])]
        self._speed = state.get("speed", 0.0)  # tokens sampled per second
        self._reference = self._open_reference(build_model)
        self._of_step: StepCompletions | None = None
        self._sums = torch.zeros(0)  # SUMS of the loss, and tokens whose experts differ, on this rank

    def _open_reference(self, build_model: BuildModel) -> CausalLM | None:
        """The frozen model of rl.reference; None without a KL term."""
        if self._rl.reference is None:
            return None
        stage = replace(self._config.stage, init_from=self._rl.reference)
        init = replace(self._config.init, upcycle="none")
        return build_model(replace(self._config, stage=stage, init=init)).eval().requires_grad_(False)

    def describe(self) -> list[str]:
        """The prompts and the verifiers."""
        rewards = ", ".join(f"{name} ({of.kind})" for name, of in self._rl.verifiers.items())
        what = f"{self._groups} prompts x {self._rl.group_size} completions per step, rewards: {rewards}"
        return [*self._prompts.describe(), what]

    def micro_batches(self) -> list[Batch]:
        """The completions of the next step; at the start of a phase, they are sampled first."""
        update = self._step % self._rl.updates
        if update == 0:
            first = self._step * self._groups
            prompts = [self._prompts[first + n] for n in range(self._groups * self._rl.updates)]
            bias, temperature = self._balance.bias, self._rl.sampling.temperature
            found = self._completer.complete(prompts, self._rl.group_size, temperature, self._step, bias)
            self._phase, self._speed = found
        size = self._groups * self._rl.group_size
        some = self._phase[update * size : (update + 1) * size]
        self._of_step = of_step = StepCompletions(some, self._rl)
        self._sums = torch.zeros(len(SUMS) + 1, dtype=torch.float64, device=self._ranks.device)
        self._step += 1
        layout = (self._ranks.rank, self._ranks.world_size, self._config.micro_batch_size)
        batches = of_step.micro_batches(*layout)
        if self._reference is None:
            return [*batches]
        with self._engine.clock.wait("reference"):
            return [self._with_reference(self._reference, batch) for batch in batches]

    @torch.no_grad()
    def _with_reference(self, reference: CausalLM, batch: PolicyBatch) -> PolicyBatch:
        """`batch` with the log-probabilities of its labels under the reference model."""
        here = batch.to(self._ranks.device)
        output = reference(
            here.input_ids,
            here.position_ids,
            here.cu_seqlens,
            labels=here.labels,
            lengths=here.lengths,
            how=batch.temperature,
        )
        assert output.log_probs is not None
        return replace(batch, reference_log_probs=output.log_probs.cpu())

    @contextmanager
    def _around(self, part: str) -> Iterator[None]:
        """The time of a part of a phase is told; the model is in evaluation mode while it samples."""
        with self._engine.clock.wait(part):
            if part != "sampling":
                yield
                return
            self._engine.module.eval()
            with self._engine.gathered(self._rl.sampling.gather_weights):
                yield
            self._engine.module.train()

    def loss_shares(
        self, batch: Batch, output: ModelOutput, frequencies: Tensor | None, totals: Totals
    ) -> LossShares:
        """The policy loss of a micro-batch, and the terms of its routers."""
        assert isinstance(batch, PolicyBatch)
        assert output.log_probs is not None
        assert output.entropies is not None
        terms = policy_loss(output.log_probs, output.entropies, batch, self._rl)
        self._sums[:-1] += terms.sums
        if output.router is not None and output.router.mismatches is not None:
            self._sums[-1] += output.router.mismatches.mean()
        return LossShares.of(terms.loss, output, frequencies, totals)

    def evaluate(self) -> dict[str, float]:
        """Mean reward of one greedy completion of held-out prompts: `reward/SOURCE`, `reward/validation`."""
        return self._completer.held_out_rewards(self._step, self._balance.bias)

    def metrics(self) -> dict[str, Any]:
        """Rewards, lengths and what the loss says of the step, over all ranks; a few completions to read."""
        assert self._of_step is not None
        some, of_step = self._of_step.completions, self._of_step
        rewards, lengths = [one.reward for one in some], [one.length for one in some]
        parts = [one.parts or {} for one in some]
        return {
            "reward": fmean(rewards),
            "reward_deviation": pstdev(rewards),
            "rewards": {name: fmean(of[name][0] for of in parts) for name in self._rl.verifiers},
            "failed_checks": fmean(failed for of in parts for _, _, failed in of.values()),
            "flat_groups": float(of_step.flat.double().mean()),
            "completion_tokens": fmean(lengths),
            "longest_completion": max(lengths),
            "truncated": fmean(one.truncated for one in some),
            "length_penalty": -float(of_step.penalties.mean()),
            "sampled_tokens_per_second": self._speed,
            **self._loss_metrics(sum(len(one.ids) - 1 for one in some)),
            "sources": self._prompts.seen(self._step * self._groups),
            "samples": [self._shown(one) for one in some[:: max(1, len(some) // SHOWN)][:SHOWN]],
        }

    def _loss_metrics(self, tokens_seen: int) -> dict[str, float]:
        """Means over the tokens of the global batch that have a weight in the loss."""
        sums = self._sums.clone()
        dist.all_reduce(sums)
        tokens, *of_tokens, mismatches = sums.tolist()
        found = {name: of / max(tokens, 1) for name, of in zip(SUMS[1:], of_tokens, strict=True)}
        if self._rl.sampling.router_replay != "none":
            found["router_mismatch"] = mismatches / tokens_seen
        return found

    def _shown(self, one: Completion) -> dict[str, Any]:
        prompt, rest = one.ids[: one.prompt_tokens], one.ids[one.prompt_tokens :]
        reasons = {name: f"{reward:g}: {reason}" for name, (reward, reason, _) in (one.parts or {}).items()}
        shown = {"source": one.source, "row": one.row, "reward": one.reward, "reasons": reasons}
        return shown | {
            "prompt": self._completer.tokenizer.decode(prompt),
            "completion": self._completer.tokenizer.decode(rest),
        }

    def results(self, metrics: dict[str, Any]) -> dict[str, str]:
        """The mean rewards of the last step and of the held-out prompts."""
        held_out = [
            f"{key[7:]} {value:.3f}"
            for key, value in metrics.items()
            if key.startswith("reward/") and key != "reward/validation"
        ]
        return {"reward": f"{metrics['reward']:.3f}", "held out": ", ".join(held_out)}

    def state(self, step: int) -> dict[str, Any]:
        """The completions of the phase that is not over after `step`."""
        if step % self._rl.updates == 0:
            return {}
        return {"completions": [asdict(one) for one in self._phase], "speed": self._speed}

    def close(self) -> None:
        """End the workers of the verifiers and close the files of the prompts."""
        self._completer.close()
        self._prompts.close()
