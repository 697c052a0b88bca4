"""Initial weights: functions of (seed, hub name), so that all layouts of ranks start from the same values."""

from pathlib import Path

import torch
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.hf import ROUTER, from_hub, hub_tensors, load_hf
from moe.model import CausalLM
from moe.router import seeded


@torch.no_grad()
def init_weights(model: CausalLM, seed: int, ep_rank: int = 0, router_scale: float = 1.0) -> None:
    """Draw every weight from N(0, initializer_range), in place; norms become the identity, biases 0.

    Routers have the standard deviation router_scale * initializer_range. In linear attention dt_bias is 1 and
    A_log the logarithm of U(0.01, 16), as in transformers. Each hub tensor (one per expert and projection) is
    drawn in fp32 from its own generator: the values do not depend on ep_size, and on the dtype only by
    rounding. CPU and CUDA draw different values.
    """
    for name, tensor in hub_tensors(model, ep_rank):
        if name.endswith(("norm.weight", "norm_hidden.weight", "norm_embedding.weight", "dt_bias")):
            identity = 0.0 if model.config.zero_centered_norm and "linear_attn" not in name else 1.0
            nn.init.constant_(tensor, identity)
        elif name.endswith(".bias"):
            nn.init.zeros_(tensor)
        elif name.endswith("A_log"):
            tensor.copy_((0.01 + 15.99 * torch.special.ndtr(normal(seed, name, tensor))).log())
        else:
            scale = router_scale if name.endswith(ROUTER) else 1.0
            tensor.copy_(scale * model.config.initializer_range * normal(seed, name, tensor))


@torch.no_grad()
def upcycle_weights(
    model: CausalLM, folder: Path, *, seed: int, noise: float = 0.0, ep_rank: int = 0, router_scale: float = 1
) -> None:
    """Fill the mixture `model` from the dense folder, in place. The laws of moe/upcycle.py must hold.

    `noise` is the standard deviation of the normal noise that is added to each expert tensor, relative to the
    standard deviation of that tensor. Values do not depend on ep_size. Raises ConfigError as `load_hf` does.
    """
    slices = ModelConfig.of_folder(folder).intermediate_size // model.config.moe_intermediate_size
    load_hf(model, folder, ep_rank=ep_rank, dense_slices=slices)
    for name, tensor in hub_tensors(model, ep_rank):
        if name.endswith(ROUTER):
            rows = normal(seed, name, tensor[::slices]).repeat_interleave(slices, dim=0)
            tensor.copy_(router_scale * model.config.initializer_range * rows)
        elif from_hub(name)[1] is not None:
            if name.endswith("down_proj.weight"):
                tensor.mul_(slices)
            if noise:
                tensor.add_(normal(seed, name, tensor), alpha=noise * float(tensor.std()))


def normal(seed: int, name: str, like: Tensor) -> Tensor:
    """N(0, 1) in fp32 in the shape of `like`: a function of (seed, name) and the kind of device."""
    generator = seeded(f"{seed}:{name}", like.device)
    return torch.empty_like(like, dtype=torch.float32).normal_(generator=generator)
