"""ModelConfig: its laws, the spellings of config.json, and the arithmetic of sizes."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from moe.config import ConfigError, ModelConfig

MOE = ModelConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    hidden_act="silu",
    max_position_embeddings=256,
    initializer_range=0.02,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    attention_bias=False,
    tie_word_embeddings=False,
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=32,
    norm_topk_prob=True,
    router_aux_loss_coef=0.001,
    decoder_sparse_step=1,
    mlp_only_layers=[],
)
DENSE = replace(MOE, num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0, router_aux_loss_coef=0.0)


def test_sound_configurations_have_no_problems() -> None:
    assert MOE.problems() == []
    assert DENSE.problems() == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"vocab_size": 0}, "model.vocab_size=0 must be above 0"),
        ({"rms_norm_eps": 0.0}, "model.rms_norm_eps=0.0 must be above 0"),
        ({"initializer_range": -0.1}, "model.initializer_range=-0.1 must not be negative"),
        ({"num_experts": -1}, "model.num_experts=-1 must not be negative"),
        ({"hidden_act": "gelu"}, "model.hidden_act=gelu must be silu, the only activation of Qwen3"),
        ({"head_dim": 15}, "model.head_dim=15 must be even: rotary embeddings turn pairs"),
        (
            {"num_key_value_heads": 3},
            "model.num_key_value_heads=3 does not divide model.num_attention_heads=8; use a divisor",
        ),
        ({"num_experts_per_tok": 0}, "model.num_experts_per_tok=0 must be above 0"),
        ({"num_experts_per_tok": 17}, "model.num_experts_per_tok=17 must not exceed model.num_experts=16"),
        (
            {"mlp_only_layers": [1, 6]},
            "model.mlp_only_layers=[1, 6] names layers [6]; layers run from 0 to 5",
        ),
        (
            {"decoder_sparse_step": 7},
            "model.decoder_sparse_step=7 and model.mlp_only_layers=[] leave no sparse layer; "
            "set model.num_experts=0 for a dense model",
        ),
        (
            {"intermediate_size": 0, "mlp_only_layers": [2]},
            "model.intermediate_size=0 must be above 0: the model has dense layers",
        ),
    ],
)
def test_each_law(change: dict[str, Any], line: str) -> None:
    assert replace(MOE, **change).problems() == [line]


def test_all_problems_at_once() -> None:
    broken = replace(MOE, head_dim=15, num_key_value_heads=3, hidden_act="relu")
    assert len(broken.problems()) == 3
    assert str(ConfigError(broken.problems())).count("\n") == 2


def test_sparse_layers() -> None:
    assert MOE.moe_layers == [0, 1, 2, 3, 4, 5]
    assert replace(MOE, decoder_sparse_step=2).moe_layers == [1, 3, 5]
    assert replace(MOE, decoder_sparse_step=2, mlp_only_layers=[3]).moe_layers == [1, 5]
    assert DENSE.moe_layers == []


def test_flops_of_a_dense_model_by_hand() -> None:
    attention = 64 * (8 + 2 + 2) * 16 + 8 * 16 * 64 + 2 * 16
    layer = attention + 3 * 64 * 96 + 2 * 64
    multiplied = 6 * layer + 64 + 1000 * 64  # final norm and head
    scores = 6 * 8 * 16 * 100  # layers x heads x head_dim x seq_len
    assert DENSE.flops_per_token(100) == 6 * (multiplied + scores)
    tied = replace(DENSE, tie_word_embeddings=True)
    assert tied.flops_per_token(100) == DENSE.flops_per_token(100)
    assert tied.num_parameters() == DENSE.num_parameters() - 1000 * 64


@pytest.mark.parametrize("config", [MOE, DENSE, replace(MOE, mlp_only_layers=[1], decoder_sparse_step=2)])
def test_hf_round_trip(config: ModelConfig) -> None:
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_old_keys_are_written() -> None:
    moe, dense = MOE.to_hf(), DENSE.to_hf()
    assert (moe["model_type"], moe["architectures"]) == ("qwen3_moe", ["Qwen3MoeForCausalLM"])
    assert (dense["model_type"], dense["architectures"]) == ("qwen3", ["Qwen3ForCausalLM"])
    assert moe["num_experts"] == 16
    assert moe["rope_theta"] == 10000.0
    assert "num_experts" not in dense


def test_new_spelling_is_read() -> None:
    hf = MOE.to_hf()
    hf["num_local_experts"] = hf.pop("num_experts")
    hf["rope_parameters"] = {"rope_type": "default", "rope_theta": hf.pop("rope_theta")}
    assert ModelConfig.from_hf(hf) == MOE


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"model_type": "llama"}, "model_type=llama is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types holds ['linear_attention']"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type=yarn is not supported"),
        ({"norm_topk_prob": None}, "key norm_topk_prob is missing"),
        ({"num_experts_per_tok": 17}, "model.num_experts_per_tok=17 must not exceed"),
    ],
)
def test_what_we_do_not_compute_is_refused(change: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf({**MOE.to_hf(), **change})
    assert fragment in str(error.value)


def test_config_needs_no_torch() -> None:
    code = "import sys, moe.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
