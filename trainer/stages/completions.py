"""The completions of a sampling phase: what the loss needs of them, and their micro-batches."""
# P prompts, G completions of each, T tokens of a micro-batch, L sparse layers, K experts of a token

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from data_pipeline.loader import Batch
from data_pipeline.packing import NO_LOSS
from trainer.engine.policy import PolicyBatch, flat_groups, group_advantages, overlong_penalty, token_weights
from trainer.settings.rl import RLConfig


@dataclass
class Completion:
    """One completion of a prompt, and its reward."""

    row: int  # global number of the prompt
    source: str
    number: int  # among the completions of the prompt
    ids: list[int]  # of the prompt and the completion
    prompt_tokens: int
    log_probs: list[float]  # of the completion's tokens, when they were sampled
    truncated: bool
    experts: Tensor | None = None  # [tokens but the last, L, K], if they are kept
    reward: float = 0.0
    parts: dict[str, list[Any]] | None = None  # verifier -> its reward, its reason, whether it failed

    @property
    def length(self) -> int:
        """Tokens of the completion."""
        return len(self.ids) - self.prompt_tokens


class StepCompletions:
    """The completions of one optimizer step, group by group, with what follows from all of them.

    Every rank computes advantages and weights from all completions, so that they do not depend on the layout.
    """

    def __init__(self, completions: list[Completion], rl: RLConfig) -> None:
        self.completions, self._temperature = completions, rl.sampling.temperature
        self._replay = rl.sampling.router_replay == "replay"
        longest, lengths = rl.sampling.max_new_tokens, [one.length for one in completions]
        rewards = torch.tensor([one.reward for one in completions], dtype=torch.float64)
        self.penalties = torch.zeros_like(rewards)  # [P*G] added to the rewards
        if rl.overlong == "penalise":
            of = [overlong_penalty(length, longest, rl.overlong_buffer) for length in lengths]
            self.penalties = torch.tensor(of, dtype=torch.float64)
        groups = (rewards + self.penalties).unflatten(0, (-1, rl.group_size))  # [P, G]
        self.flat = flat_groups(groups)  # [P]
        learned = torch.ones_like(rewards, dtype=torch.bool)
        if rl.flat_groups == "drop":
            learned &= ~self.flat.repeat_interleave(rl.group_size)
        if rl.overlong == "mask":
            learned &= torch.tensor([not one.truncated for one in completions])
        self.advantages = group_advantages(groups, rl.advantage).flatten()  # [P*G]
        self.weights = token_weights(torch.tensor(lengths), learned, rl.loss_sum, longest)  # [P*G] per token

    def micro_batches(self, rank: int, world_size: int, micro_batch_size: int) -> list[PolicyBatch]:
        """This rank's micro-batches: completions of similar length, so that all ranks have as much to do."""
        order = sorted(range(len(self.completions)), key=lambda i: -len(self.completions[i].ids))
        size = world_size * micro_batch_size
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        return [self._batch(part[rank::world_size]) for part in parts]

    def _batch(self, chosen: list[int]) -> PolicyBatch:
        """One row [1, T] of whole completions, without padding; each is a document, its prompt included."""
        some = [self.completions[i] for i in chosen]
        lengths = [len(one.ids) - 1 for one in some]  # the last token is only a label

        def row(values: Iterable[Any], dtype: torch.dtype) -> Tensor:
            return torch.cat([torch.as_tensor(of, dtype=dtype) for of in values]).unsqueeze(0)

        def after_prompts(values: Iterable[Iterable[Any]], nothing: float) -> list[list[Any]]:
            """Values of the tokens of each completion, where those tokens are labels."""
            return [
                [nothing] * (one.prompt_tokens - 1) + list(of) for one, of in zip(some, values, strict=True)
            ]

        def of_tokens(values: Iterable[Iterable[float]]) -> Tensor:
            return row(after_prompts(values, 0.0), torch.float32)

        plain = Batch.of(
            row((one.ids[:-1] for one in some), torch.int64),
            row(after_prompts((one.ids[one.prompt_tokens :] for one in some), NO_LOSS), torch.int64),
            row((range(length) for length in lengths), torch.int64),
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
            torch.ones(1, sum(lengths), dtype=torch.bool),
            tuple(one.row for one in some),
        )
        experts = [one.experts for one in some if one.experts is not None]
        return PolicyBatch(
            **vars(plain),
            sampled_log_probs=of_tokens(one.log_probs for one in some),
            reference_log_probs=None,
            advantages=of_tokens([float(self.advantages[i])] * self.completions[i].length for i in chosen),
            weights=of_tokens([float(self.weights[i])] * self.completions[i].length for i in chosen),
            temperature=self._temperature,
            sampled_experts=torch.cat(experts).to(torch.int16) if experts else None,
            replay=self._replay,
        )
