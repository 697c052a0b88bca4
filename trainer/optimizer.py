"""AdamW over parameter groups: decayed matrices, undecayed rest, experts apart as DeepSpeed reduces them."""

import torch
from torch import nn

from trainer.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's AdamW; weight decay falls on matrices other than embeddings.

    Parameters that the engine marked with `group_name` (experts, reduced over their own group) form groups of
    their own, with DeepSpeed's keys `moe` and `name`. The rate is 0 until the loop sets it at every step:
    DeepSpeed steps once while it sets up, and that must move nothing.
    """
    groups: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        decayed = parameter.ndim > 1 and "embed_tokens" not in name
        expert_group = getattr(parameter, "group_name", None)
        # DeepSpeed finds an expert group by this very name.
        key = f"{expert_group or 'shared'}/{'decay' if decayed else 'no_decay'}"
        group = groups.setdefault(
            key,
            {
                "params": [],
                "name": expert_group or key,
                "weight_decay": config.weight_decay if decayed else 0.0,
            },
        )
        if expert_group:
            group["moe"] = True
        group["params"].append(parameter)
    beta1, beta2 = config.betas
    return torch.optim.AdamW(list(groups.values()), lr=0.0, betas=(beta1, beta2), eps=config.eps, fused=True)
