"""Shapes of the tiny models that are compared with transformers, and the comparison."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from moe.config import ModelConfig
from moe.formats import RopeScaling

_PLAIN = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[2] / "conf" / "model" / "_base.yaml"))
_DENSE = {
    **_PLAIN,
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "use_qk_norm": True,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough that softmax, norms and routing are clearly nonlinear
    "rope_theta": 10000.0,
}
_MOE = {**_DENSE, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
_QWEN2 = {"use_qk_norm": False, "qkv_bias": True}
_SHARED = {"shared_expert_intermediate_size": 28, "shared_expert_gate": True, "norm_topk_prob": False}
_NEXT = {
    **_MOE,
    **_SHARED,
    "zero_centered_norm": True,
    "attn_output_gate": True,
    "partial_rotary_factor": 0.5,
    "norm_topk_prob": True,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-2,  # the gated norm would magnify the rounding of values near zero
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 4,
}
_YARN = RopeScaling("yarn", factor=4.0, original_max_position_embeddings=64)

CASES = {
    "dense": _DENSE,
    "dense-tied-bias": {**_DENSE, "tie_word_embeddings": True, "attention_bias": True, "rope_theta": 1e6},
    "dense-odd-heads": {**_DENSE, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 6},
    "dense-mha-wide-heads": {**_DENSE, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 32},
    "moe": _MOE,
    "moe-tied-unnormalised": {**_MOE, "tie_word_embeddings": True, "norm_topk_prob": False},
    "moe-odd-heads-bias": {
        **_MOE,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "attention_bias": True,
    },
    # normalised, the single weight would be 1 and the router would have no gradient
    "moe-top1": {**_MOE, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "moe-sparse-step-2": {**_MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2},
    "moe-mlp-only": {**_MOE, "num_hidden_layers": 3, "mlp_only_layers": [0, 2]},
    "qwen2": {**_DENSE, **_QWEN2},
    "qwen2-tied-one-kv-head": {
        **_DENSE,
        **_QWEN2,
        "tie_word_embeddings": True,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
    },
    "qwen2-moe": {**_MOE, **_QWEN2, **_SHARED},
    "qwen2-moe-tied-mixed": {
        **_MOE,
        **_QWEN2,
        **_SHARED,
        "tie_word_embeddings": True,
        "qkv_bias": False,
        "norm_topk_prob": True,
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
    },
    "next": _NEXT,
    "next-odd-heads-tied": {
        **_NEXT,
        "tie_word_embeddings": True,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "partial_rotary_factor": 0.25,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 3,
        "linear_conv_kernel_dim": 3,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "linear_attention"],
        "mlp_only_layers": [0],
    },
    "next-full-attention-bias": {
        **_NEXT,
        "layer_types": ["full_attention"],
        "num_hidden_layers": 2,
        "attention_bias": True,
    },
    "dense-yarn": {**_DENSE, "rope_scaling": _YARN},
    "next-yarn-by-hand": {
        **_NEXT,
        "rope_scaling": RopeScaling("yarn", 2.5, 100, attention_factor=1.3, beta_fast=8.0, beta_slow=0.5),
    },
}


@pytest.fixture(params=CASES, ids=str)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """Each of the tiny shapes in turn."""
    return ModelConfig(**CASES[request.param])


@pytest.fixture(params=["moe", "dense-tied-bias", "next"], ids=str)
def moe_or_dense(request: pytest.FixtureRequest) -> ModelConfig:
    """A sparse, a dense and a hybrid shape, for tests that do not depend on the sizes."""
    return ModelConfig(**CASES[request.param])


@pytest.fixture
def assert_close() -> Callable[[Tensor, Tensor, str], None]:
    """max |a - b| <= 1e-5 max |b|."""

    def check(actual: Tensor, expected: Tensor, what: str) -> None:
        assert actual.shape == expected.shape, what
        scale = expected.abs().max()
        assert scale > 0, f"{what}: the reference is zero, so the comparison proves nothing"
        error = ((actual - expected).abs().max() / scale).item()
        assert error <= 1e-5, f"{what}: relative error {error:.2e}"

    return check


@pytest.fixture(params=[17, 150], ids=["short", "long"])
def rows(request: pytest.FixtureRequest) -> Mapping[str, Tensor]:
    """Model inputs of three rows, one document each; long rows span several chunks of linear attention."""
    count, length = 3, request.param
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(0, 97, (count, length), generator=generator),
        "position_ids": torch.arange(length).expand(count, length),
        "cu_seqlens": torch.arange(0, count * length + 1, length, dtype=torch.int32),
    }
