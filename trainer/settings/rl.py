"""Reinforcement learning with verifiable rewards: its keys and their laws. docs/rl.md says what they do."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from trainer.settings.typed import AtLeast0, AtLeast1, NotNegative


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
    router_replay: Literal["off", "measure", "replay"]  # the loss uses the experts that sampling chose


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
