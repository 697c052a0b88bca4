"""Tiny models and packed batches."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from moe.config import ModelConfig
from moe.init import init_weights
from moe.model import CausalLM

VOCABULARY = 61


@pytest.fixture
def dense_config(repository: Path) -> ModelConfig:
    """Two layers, 3 query heads on 1 key/value head, biases, tied."""
    plain = OmegaConf.to_container(OmegaConf.load(repository / "conf" / "model" / "_base.yaml"))
    return ModelConfig(
        **{
            **plain,
            "vocab_size": VOCABULARY,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "use_qk_norm": True,
            "max_position_embeddings": 256,
            "initializer_range": 0.3,
            "rope_theta": 10000.0,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "router_aux_loss_coef": 0.0,
        }
    )


@pytest.fixture
def moe_config(dense_config: ModelConfig) -> ModelConfig:
    """Three layers, the middle one dense; 8 experts, top-2; untied, no biases."""
    sparse = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "mlp_only_layers": [1]}
    plain = {"num_hidden_layers": 3, "attention_bias": False, "tie_word_embeddings": False}
    return ModelConfig(**{**vars(dense_config), **sparse, **plain})


@pytest.fixture
def next_config(moe_config: ModelConfig) -> ModelConfig:
    """Two linear attention layers, one full: gated, zero-centred norms, partial rotary; a shared expert."""
    return replace(
        moe_config,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=6,
        linear_value_head_dim=10,
        linear_conv_kernel_dim=4,
        attn_output_gate=True,
        zero_centered_norm=True,
        partial_rotary_factor=0.5,
        shared_expert_intermediate_size=20,
        shared_expert_gate=True,
    )


@pytest.fixture(params=["dense", "moe", "next"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """The dense, the sparse and the hybrid configuration in turn."""
    return request.getfixturevalue(f"{request.param}_config")


@pytest.fixture(params=["dense", "moe", "next", "qwen2", "qwen2_moe"])
def generating(request: pytest.FixtureRequest) -> ModelConfig:
    """A model of each architecture; Qwen2 has biases on query, key and value, and no head norms."""
    kind = request.param.replace("qwen2_", "").replace("qwen2", "dense")
    config = request.getfixturevalue(f"{kind}_config")
    if "qwen2" not in request.param:
        return config
    shared = {"shared_expert_intermediate_size": 20, "shared_expert_gate": True, "norm_topk_prob": False}
    config = replace(config, attention_bias=False, qkv_bias=True, use_qk_norm=False)
    config = replace(config, **(shared if config.num_experts else {}))
    assert config.to_hf()["model_type"] == request.param
    return config


@pytest.fixture
def build() -> Callable[..., CausalLM]:
    """A model with random values everywhere, norms and biases too; keywords go to CausalLM."""

    def make(config: ModelConfig, **keywords: str) -> CausalLM:
        model = CausalLM(config, **keywords)
        init_weights(model, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("norm.weight", "bias")):
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        return model

    return make


@pytest.fixture
def pack() -> Callable[[list[list[int]]], dict[str, Tensor]]:
    """Random ids in documents of the given lengths, one list per row; all rows have the same length."""

    def make(rows: list[list[int]]) -> dict[str, Tensor]:
        lengths = [length for row in rows for length in row]
        shape = (len(rows), sum(rows[0]))
        generator = torch.Generator().manual_seed(2)
        return {
            "input_ids": torch.randint(0, VOCABULARY, shape, generator=generator),
            "position_ids": torch.cat([torch.arange(length) for length in lengths]).view(shape),
            "cu_seqlens": torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32),
        }

    return make
