"""Complete prompts and have the completions checked. `trainer.evaluate` imports it without DeepSpeed."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import fmean
from time import perf_counter
from typing import Any

import torch.distributed as dist
from torch import Tensor

from data_pipeline.permutation import derive_key
from data_pipeline.prompts import Prompt, Prompts
from data_pipeline.tokenizer import tokenizer_of
from moe.model import ModelOutput
from moe.next_token import SamplingSettings
from moe.sampling import Request, sample
from trainer.ranks.runtime import Ranks
from trainer.settings.config import RunConfig
from trainer.stages.completions import Completion
from trainer.verifiers.scorer import Scorer

WORKERS = 4  # processes of each rank that check completions


class Completer:
    """Completes the prompts of a run with `model`, called like `CausalLM.forward`, and has them rewarded.

    around: entered around "sampling" and around "scoring". Every rank makes the same calls.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        model: Callable[..., ModelOutput],
        around: Callable[[str], AbstractContextManager[None]] = lambda part: nullcontext(),
    ) -> None:
        assert config.rl is not None
        self._config, self._rl, self._ranks = config, config.rl, ranks
        self._model, self._around = model, around
        self.tokenizer = tokenizer_of(config.data)
        self._stops = (self.tokenizer.control_id("<|im_end|>"), self.tokenizer.end_of_text)
        self._scorer = Scorer(config.rl.verifiers, WORKERS)

    def complete(
        self, prompts: list[Prompt], each: int, temperature: float, step: int, bias: Tensor | None
    ) -> tuple[list[Completion], float]:
        """`each` completions of every prompt with their rewards, in order, on all ranks; tokens per second.

        A completion is a function of the weights, the seed, the step, the prompt and its number. bias [L, E]:
        the selection bias of the routers.
        """
        wanted = [(prompt, number) for prompt in prompts for number in range(each)]
        mine = wanted[self._ranks.rank :: self._ranks.world_size]
        started = perf_counter()
        with self._around("sampling"):
            found = self._sample(mine, temperature, step, bias)
        seconds = perf_counter() - started
        with self._around("scoring"):
            self._score(mine, found)
            everywhere: list[Any] = [found]
            if dist.is_initialized():
                everywhere = [None] * self._ranks.world_size
                dist.all_gather_object(everywhere, found)
        completions = [everywhere[i % len(everywhere)][i // len(everywhere)] for i in range(len(wanted))]
        return completions, sum(one.length for one in completions) / seconds

    def held_out_rewards(self, step: int, bias: Tensor | None) -> dict[str, float]:
        """Mean reward of one greedy completion of held-out prompts: `reward/SOURCE`, `reward/validation`."""
        rewards: dict[str, list[float]] = {}
        for name in sorted(self._config.data.trained_sources()):
            seed = self._config.seed
            with Prompts(self._config.data, seed=seed, split="validation", source=name) as held_out:
                some = [held_out[n] for n in range(min(len(held_out), self._config.evaluate.rows))]
            completions, _ = self.complete(some, 1, 0.0, step, bias) if some else ([], 0)
            rewards[name] = [one.reward for one in completions]
        rewards["validation"] = [reward for of in rewards.values() for reward in of]
        return {f"reward/{name}": fmean(of) for name, of in rewards.items() if of}

    def close(self) -> None:
        """End the processes of the verifiers."""
        self._scorer.close()

    def _sample(
        self, wanted: list[tuple[Prompt, int]], temperature: float, step: int, bias: Tensor | None
    ) -> list[Completion]:
        """Completions without rewards."""
        how, seed = self._rl.sampling, self._config.seed
        settings = SamplingSettings(
            temperature, how.top_p, how.top_k, how.min_new_tokens, how.max_new_tokens, self._stops
        )
        keys = [derive_key(seed, step, prompt.source, prompt.row, n) for prompt, n in wanted]
        ended = sample(
            self._model,
            [Request(key, prompt.ids) for key, (prompt, _) in zip(keys, wanted, strict=True)],
            settings,
            rows_at_once=how.rows_at_once,
            device=self._ranks.device,
            anyone=self._ranks.any,
            bias=bias,
            keep_experts=how.router_replay != "none" and self._config.model.num_experts > 0,
        )
        samples = [one for _, one in sorted(ended)]
        return [
            Completion(
                row=prompt.row,
                source=prompt.source,
                number=number,
                ids=prompt.ids + one.tokens,
                prompt_tokens=len(prompt.ids),
                log_probs=list(one.log_probs),
                truncated=one.truncated,
                experts=one.experts,
            )
            for (prompt, number), one in zip(wanted, samples, strict=True)
        ]

    def _score(self, wanted: list[tuple[Prompt, int]], found: list[Completion]) -> None:
        """Fill in the rewards. A check that fails is told in this rank's log, with its prompt."""
        texts = [self.tokenizer.decode(one.ids[one.prompt_tokens :]) for one in found]
        checks = [(prompt.fields, text) for (prompt, _), text in zip(wanted, texts, strict=True)]
        for one, score in zip(found, self._scorer.score(checks), strict=True):
            one.reward = score.reward
            one.parts = {name: list(part) for name, part in score.parts.items()}
            for name, (_, reason, failed) in one.parts.items():
                if failed:
                    what = "verifier %s failed on completion %d of prompt %d of %s: %s"
                    logging.warning(what, name, one.number, one.row, one.source, reason)
