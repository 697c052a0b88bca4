"""Reinforcement learning with verifiable rewards: its keys and their laws. docs/rl.md says what they do."""

import importlib
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from trainer.settings.typed import AtLeast0, AtLeast1, NotNegative, similar

# The kinds of verifiers and their options: name -> default, whose type is the option's. "" = none.
OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {"answer_key": "answer", "ignore_case": False},
    "number": {"answer_key": "answer", "tolerance": 0.0},
    "math": {"answer_key": "answer"},
    "choice": {"answer_key": "answer"},
    "regex": {"pattern": "", "pattern_key": "", "match": "fullmatch"},
    "format": {"think": "optional", "pattern": ""},
    "code": {"tests_key": "tests", "partial": False, "memory_mb": 1024},
}
_CHOICES = {"match": ["fullmatch", "search"], "think": ["required", "forbidden", "optional"]}
_LEAST = {"tolerance": 0, "memory_mb": 64}  # Python itself takes 40 MB


@dataclass
class VerifierConfig:
    """A program that checks a completion; docs/rl.md lists the kinds and their options."""

    kind: str  # exact | number | math | choice | regex | format | code | module:function
    weight: NotNegative  # of its reward, relative to the sum of all weights
    seconds: Annotated[float, 0.01] = 10.0  # a check that takes longer is ended and counts as failed
    options: dict[str, Any] | None = None  # of the kind


@dataclass
class SamplingConfig:
    """How completions are sampled."""

    temperature: NotNegative  # also of the probabilities in the loss
    top_p: float  # the smallest set of tokens with this probability; 1 = all
    top_k: AtLeast0  # the k most probable tokens; 0 = all
    min_new_tokens: AtLeast0  # no end of turn before
    max_new_tokens: AtLeast1  # a completion that reaches it is truncated
    rows_at_once: AtLeast1  # sequences that a rank continues at once
    gather_weights: bool  # ZeRO-3: gather all weights once per phase, not layer by layer for every token
    router_replay: Literal["none", "measure", "replay"]  # the loss uses the experts that sampling chose


@dataclass
class RLConfig:
    """The samples, the rewards and the loss of the stage."""

    group_size: int  # completions of each prompt
    updates: AtLeast1  # optimizer steps on the completions of one sampling phase
    max_prompt_tokens: AtLeast1  # longer prompts are an error
    sampling: SamplingConfig
    verifiers: dict[str, VerifierConfig]
    advantage: Literal["deviation", "mean"]  # (r - mean) / deviation of the group | r - mean
    loss_sum: Literal["token", "sequence", "constant"]  # what a completion's tokens are divided by
    ratio: Literal["token", "sequence"]  # importance ratio of each token | of the whole completion (GSPO)
    clip_low: NotNegative  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: NotNegative
    flat_groups: Literal["keep", "drop"]  # groups whose completions all have the same reward
    overlong: Literal["learn", "mask", "penalise"]  # truncated completions
    overlong_buffer: AtLeast0  # penalise: tokens before max_new_tokens in which the penalty grows to 1
    kl_coef: NotNegative  # of the divergence from the reference, stage.init_from; 0 = no reference in memory
    reference: str | None  # its folder: usually stage.init_from

    def problems(self, seq_len: int, global_batch_size: int) -> list[str]:
        """Every broken law that the type of a single value cannot express, one line each."""
        sampling, room = self.sampling, self.max_prompt_tokens + self.sampling.max_new_tokens
        laws = {
            f"rl.group_size={self.group_size} compares a completion with nothing; use 2 or more": (
                self.group_size < 2
            ),
            f"stage.global_batch_size={global_batch_size} is the completions of a step and must be a "
            f"multiple of rl.group_size={self.group_size}": self.group_size > 1
            and global_batch_size % self.group_size > 0,
            f"rl.max_prompt_tokens={self.max_prompt_tokens} and rl.sampling.max_new_tokens="
            f"{sampling.max_new_tokens} exceed stage.seq_len={seq_len}; raise it to {room}": room > seq_len,
            f"rl.sampling.temperature={sampling.temperature} makes all of a group equal; use 1.0": (
                sampling.temperature == 0
            ),
            f"rl.sampling.top_p={sampling.top_p} is outside (0, 1]; 1 = all tokens": not 0
            < sampling.top_p
            <= 1,
            f"rl.sampling.min_new_tokens={sampling.min_new_tokens} exceeds max_new_tokens="
            f"{sampling.max_new_tokens}; lower it": sampling.min_new_tokens > sampling.max_new_tokens,
            f"rl.clip_low={self.clip_low} must be below 1: the ratio is clipped at 1 - clip_low": (
                self.clip_low >= 1
            ),
            f"rl.clip_low={self.clip_low} exceeds rl.clip_high={self.clip_high}; they seem to be exchanged": (
                self.clip_low > self.clip_high
            ),
            f"rl.overlong_buffer={self.overlong_buffer} must be between 1 and rl.sampling.max_new_tokens="
            f"{sampling.max_new_tokens} with rl.overlong=penalise": self.overlong == "penalise"
            and not 0 < self.overlong_buffer <= sampling.max_new_tokens,
            f"rl.kl_coef={self.kl_coef} needs rl.reference, the folder of the reference model": (
                self.kl_coef > 0 and self.reference is None
            ),
            f"rl.reference={self.reference} has no use with rl.kl_coef=0; set it to null": (
                self.kl_coef == 0 and self.reference is not None
            ),
        }
        found = [law for law, is_broken in laws.items() if is_broken]
        return found + verifier_problems(self.verifiers)


def verifier_problems(verifiers: dict[str, VerifierConfig]) -> list[str]:
    """Every broken law of the verifiers, one line each; imports those of the user to see that they exist."""
    if not verifiers:
        return ["rl.verifiers is empty; name at least one, as rl.verifiers.right={kind: exact, weight: 1}"]
    found = []
    if not any(config.weight for config in verifiers.values()):
        found.append("rl.verifiers: every weight is 0, so that there is no reward; raise one above 0")
    for name, config in verifiers.items():
        key = f"rl.verifiers.{name}"
        if ":" in config.kind:
            found += _function_problems(f"{key}.kind={config.kind}", *config.kind.split(":", 1))
        elif config.kind in OPTIONS:
            found += _option_problems(f"{key}.options", config.kind, config.options or {})
        else:
            hint = similar(config.kind, OPTIONS)
            known = f"use {', '.join(OPTIONS)} or module:function"
            found.append(f"{key}.kind={config.kind} is unknown{hint}; {known}")
    return found


def _function_problems(named: str, module: str, function: str) -> list[str]:
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (Exception, SystemExit) as error:  # whatever the user's file does
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        return [f"{named}: {module} cannot be imported ({why}); mend it, or put its folder on PYTHONPATH"]
    return [] if callable(found) else [f"{named}: {module} has no function {function}; define it there"]


def _option_problems(key: str, kind: str, options: dict[str, Any]) -> list[str]:
    found, known = [], OPTIONS[kind]
    for name, value in options.items():
        named, default = f"{key}.{name}", known.get(name)
        wanted: Any = (int, float) if isinstance(default, float) else type(default)
        if default is None:
            known_names = ", ".join(known)
            found.append(f"{named} is unknown{similar(name, known)}; options of {kind}: {known_names}")
        elif not isinstance(value, wanted) or (isinstance(value, bool) and not isinstance(default, bool)):
            found.append(f"{named}={value} must be of type {type(default).__name__}")
        elif name in _CHOICES and value not in _CHOICES[name]:
            found.append(f"{named}={value} is unknown; use {', '.join(_CHOICES[name])}")
        elif name in _LEAST and not value >= _LEAST[name]:
            found.append(f"{named}={value} is below {_LEAST[name]}; use {_LEAST[name]} or more")
        elif name == "pattern":
            try:
                re.compile(value)
            except (re.error, OverflowError, RecursionError) as error:
                found.append(f"{named}={value} is no regular expression ({error}); mend it")
    if kind == "regex" and bool(options.get("pattern")) == bool(options.get("pattern_key")):
        found.append(f"{key} must hold either pattern, or pattern_key: the field of the row that has it")
    return found
