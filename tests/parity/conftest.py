"""Shapes of the tiny models that are compared with transformers, and the comparison."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from moe.config import ModelConfig

_DENSE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large enough that softmax, norms and routing are far from linear
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_experts": 0,
    "num_experts_per_tok": 0,
    "moe_intermediate_size": 0,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_MOE = {**_DENSE, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}

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
    # normalised, the one weight is 1 and the router has no gradient
    "moe-top1": {**_MOE, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "moe-sparse-step-2": {**_MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2},
    "moe-mlp-only": {**_MOE, "num_hidden_layers": 3, "mlp_only_layers": [0, 2]},
}


@pytest.fixture(params=CASES, ids=str)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """Each of the tiny shapes in turn."""
    return ModelConfig(**CASES[request.param])


@pytest.fixture(params=["moe", "dense-tied-bias"], ids=str)
def moe_or_dense(request: pytest.FixtureRequest) -> ModelConfig:
    """One sparse and one dense shape, for what does not depend on the numbers."""
    return ModelConfig(**CASES[request.param])


@pytest.fixture
def assert_close() -> Callable[[Tensor, Tensor, str], None]:
    """max |a - b| <= 1e-5 max |b|."""

    def check(actual: Tensor, expected: Tensor, what: str) -> None:
        assert actual.shape == expected.shape, what
        scale = expected.abs().max()
        assert scale > 0, f"{what}: the reference is zero, the comparison says nothing"
        error = ((actual - expected).abs().max() / scale).item()
        assert error <= 1e-5, f"{what}: relative error {error:.2e}"

    return check


@pytest.fixture
def rows() -> Mapping[str, Tensor]:
    """Three rows of 17 tokens, a document each, as the model takes them."""
    count, length = 3, 17
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(0, 97, (count, length), generator=generator),
        "position_ids": torch.arange(length).expand(count, length),
        "cu_seqlens": torch.arange(0, count * length + 1, length, dtype=torch.int32),
    }
