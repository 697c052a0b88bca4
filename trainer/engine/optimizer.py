"""AdamW and its learning rate. Parameter groups: with and without weight decay, by kind, experts apart."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe.norm import ZeroCenteredRMSNorm
from trainer.settings.config import OptimizerConfig, ScheduleConfig

# Kinds of parameters, and parts of names by which each is found; the rest (norms, dense MLPs) is `other`.
_NAMES = {
    "experts": (".mlp.experts.",),
    "router": (".mlp.gate.weight",),
    "attention": ("_attn.",),
    "embedding": ("embed_tokens", "lm_head"),
}
KINDS = (*_NAMES, "other")


class Rule(NamedTuple):
    """What checkpoints and metrics need to know of a torch optimizer."""

    states: tuple[str, ...]  # the names of its states that have the shape of the weights, [n] fp32
    change: Callable[..., Tensor]  # group, step, gradient, new weights, states -> old minus new, all [n]


def kind_of(name: str) -> str:
    """The kind of a parameter, by its name."""
    return next((kind for kind, parts in _NAMES.items() if any(part in name for part in parts)), "other")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's AdamW. Weight decay applies to matrices except embeddings, and to zero-centred norms of query
    and key heads, which it pulls to the identity, as in Qwen3-Next (Megatron-LM's apply_wd_to_qk_layernorm).

    A group holds parameters of one `kind`, so that norms by kind can be computed from the groups.
    Parameters that the engine marked with `group_name` (experts, reduced over their own group) form groups of
    their own, with DeepSpeed's keys `moe` and `name`. The rate is 0 until the loop sets it at every step:
    DeepSpeed takes one step during its set-up, which must not change the weights.
    """
    groups: dict[str, dict] = {}
    centred = [name for name, module in model.named_modules() if isinstance(module, ZeroCenteredRMSNorm)]
    for name, parameter in model.named_parameters():
        decayed = parameter.ndim > 1 and "embed_tokens" not in name
        norm = name.removesuffix(".weight")
        decayed |= norm in centred and norm.endswith(("q_norm", "k_norm"))
        expert_group = getattr(parameter, "group_name", None)
        key = f"{expert_group or kind_of(name)}/{'decay' if decayed else 'no_decay'}"
        decay = config.weight_decay if decayed else 0.0
        group = groups.setdefault(key, {"params": [], "kind": kind_of(name), "weight_decay": decay})
        group["name"] = expert_group or key  # DeepSpeed finds an expert group by this name
        if expert_group:
            group["moe"] = True
        group["params"].append(parameter)
    beta1, beta2 = config.betas
    return torch.optim.AdamW(list(groups.values()), lr=0.0, betas=(beta1, beta2), eps=config.eps, fused=True)


def _adamw_change(
    group: dict[str, Any], step: Tensor, gradient: Tensor, new: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    """Old minus `new` weights of an AdamW step, from the moments, all [n] (arXiv 1711.05101)."""
    beta1, beta2 = group["betas"]
    rate, decay = group["lr"], group["lr"] * group["weight_decay"]
    scale1, scale2 = ((1 - beta ** step.double()).to(new.dtype) for beta in (beta1, beta2))
    change = (variance / scale2).sqrt_().add_(group["eps"])
    # new = old (1 - decay) - adam, so that old - new = (adam + decay new) / (1 - decay)
    return torch.div(mean / scale1, change, out=change).mul_(rate).add_(new, alpha=decay).div_(1 - decay)


RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.AdamW: Rule(("exp_avg", "exp_avg_sq"), _adamw_change),
}


def states_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The names of the states that a checkpoint keeps of an optimizer."""
    return RULES[type(optimizer)].states


def learning_rate(config: ScheduleConfig, peak: float, step: int, total_steps: int) -> float:
    """Learning rate of the update numbered `step` (from 0) out of `total_steps`.

    Linear warmup to `peak`, a plateau, then decay to `min_lr_ratio * peak` over the last `decay_fraction` of
    the run: half a cosine (arXiv 1608.03983), linear for `wsd` (arXiv 2404.06395), none for `constant`.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    decay_steps = min(round(config.decay_fraction * total_steps), total_steps - config.warmup_steps)
    into_decay = step - (total_steps - decay_steps)
    if config.kind == "constant" or into_decay < 0:
        return peak
    progress = min((into_decay + 1) / decay_steps, 1.0)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if config.kind == "cosine" else 1 - progress
    return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)
