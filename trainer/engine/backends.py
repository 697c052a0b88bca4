"""Which kernels compute a model's layers on a device; the rules of the choice are in moe/."""

from typing import NamedTuple

import torch

from moe.attention import choose_attention
from moe.config import ModelConfig
from moe.experts import choose_backend
from moe.formats import FULL, LINEAR
from moe.gated_delta_net import kernel_obstacle
from moe.trial import kernels_obstacle
from trainer.ranks.runtime import DTYPES, Ranks
from trainer.settings.config import RunConfig


class Backends(NamedTuple):
    """The kernels chosen for each kind of layer in the model, and warnings about slow ones."""

    names: dict[str, str]  # "experts", "attention", "linear attention", "passes" -> e.g. "grouped", "Triton"
    warnings: list[str]


def choose_backends(
    model: ModelConfig, experts: str, device: torch.device, dtype: torch.dtype, deterministic: bool = False
) -> Backends:
    """Choose the kernels; `experts` is the key experts.backend. Raises ConfigError if it cannot run here.

    On CUDA, Triton kernels and optional packages are tried out once per process.
    """
    names: dict[str, str] = {}
    warnings: list[str] = []
    if model.num_experts:
        names["experts"], slow = choose_backend(experts, device, dtype, model, deterministic)
        warnings += [slow] if slow else []
    if FULL in model.layer_types or model.num_nextn_predict_layers:
        names["attention"], slow = choose_attention(model, device, dtype, deterministic)
        warnings += [slow] if slow else []
    if LINEAR in model.layer_types:
        key_dim, value_dim = model.linear_key_head_dim, model.linear_value_head_dim
        obstacle = kernel_obstacle(device, dtype, key_dim, value_dim)
        names["linear attention"] = "chunked" if obstacle else "fla"
        if obstacle and device.type == "cuda":
            warnings.append(f"linear attention is computed in chunks by torch, which is slower: {obstacle}")
    if device.type == "cuda":
        obstacle = kernels_obstacle(device, dtype)
        names["passes"] = "torch" if obstacle else "Triton"
        if obstacle:
            warnings.append(f"what happens between matrix products is several passes over memory: {obstacle}")
    return Backends(names, warnings)


def backends_of(config: RunConfig, ranks: Ranks) -> Backends:
    """The kernels that compute the layers on the device of this rank."""
    dtype = DTYPES[config.dtype]
    return choose_backends(config.model, config.experts.backend, ranks.device, dtype, config.deterministic)
