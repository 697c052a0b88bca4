"""First values of the weights: functions of (seed, name on the hub), so that every layout starts alike."""

import hashlib

import torch
from torch import nn

from moe.hf import hub_tensors
from moe.model import CausalLM


@torch.no_grad()
def init_weights(model: CausalLM, seed: int, ep_rank: int = 0) -> None:
    """Draw every weight from N(0, initializer_range), in place; norms become 1, biases 0.

    Each tensor that the hub names (one per expert and projection) is drawn in fp32 from a generator of its
    own: the values do not depend on ep_size, nor, but for rounding, on the dtype. CPU and CUDA differ.
    """
    for name, tensor in hub_tensors(model, ep_rank):
        if name.endswith("norm.weight"):
            nn.init.ones_(tensor)
        elif name.endswith(".bias"):
            nn.init.zeros_(tensor)
        else:
            digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
            generator = torch.Generator(tensor.device).manual_seed(int.from_bytes(digest))
            values = torch.empty_like(tensor, dtype=torch.float32)
            tensor.copy_(values.normal_(0.0, model.config.initializer_range, generator=generator))
