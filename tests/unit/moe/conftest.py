"""Tiny models and packed batches."""

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.init import init_weights
from moe.model import CausalLM

VOCABULARY = 61


@pytest.fixture
def dense_config() -> ModelConfig:
    """Two layers, 3 query heads on 1 key/value head, biases, tied."""
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        hidden_act="silu",
        max_position_embeddings=128,
        initializer_range=0.3,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        attention_bias=True,
        tie_word_embeddings=True,
        num_experts=0,
        num_experts_per_tok=0,
        moe_intermediate_size=0,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


@pytest.fixture
def moe_config(dense_config: ModelConfig) -> ModelConfig:
    """Three layers, the middle one dense; 8 experts, top-2; untied, no biases."""
    sparse = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "mlp_only_layers": [1]}
    plain = {"num_hidden_layers": 3, "attention_bias": False, "tie_word_embeddings": False}
    return ModelConfig(**{**vars(dense_config), **sparse, **plain})


@pytest.fixture(params=["dense", "moe"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """The dense and the sparse configuration in turn."""
    return request.getfixturevalue(f"{request.param}_config")


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
    """Random ids in documents of the given lengths, one list per row; all rows equally long."""

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
