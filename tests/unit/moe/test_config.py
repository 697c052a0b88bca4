"""ModelConfig: its laws, the spellings of config.json, and the counts of parameters and FLOPs."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from moe.config import ConfigError, ModelConfig
from moe.formats import RopeScaling

PLAIN = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[3] / "conf" / "model" / "_base.yaml"))
MOE = ModelConfig(
    **{
        **PLAIN,
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "use_qk_norm": True,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
    }
)
DENSE = replace(MOE, num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0, router_aux_loss_coef=0.0)
QWEN2 = replace(DENSE, use_qk_norm=False, qkv_bias=True)
QWEN2_MOE = replace(
    MOE, use_qk_norm=False, qkv_bias=True, shared_expert_intermediate_size=48, shared_expert_gate=True
)
NEXT = replace(
    MOE,
    num_hidden_layers=8,
    layer_types=["linear_attention"] * 3 + ["full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    linear_conv_kernel_dim=4,
    zero_centered_norm=True,
    attn_output_gate=True,
    partial_rotary_factor=0.25,
    shared_expert_intermediate_size=48,
    shared_expert_gate=True,
)
FAMILY = {"qwen2": QWEN2, "qwen3": DENSE, "qwen2_moe": QWEN2_MOE, "qwen3_moe": MOE, "qwen3_next": NEXT}


def test_sound_configurations_have_no_problems() -> None:
    for config in FAMILY.values():
        assert config.problems() == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"vocab_size": 0}, "model.vocab_size=0 must be above 0"),
        ({"rms_norm_eps": 0.0}, "model.rms_norm_eps=0.0 must be above 0"),
        ({"initializer_range": -0.1}, "model.initializer_range=-0.1 must not be negative"),
        ({"num_experts": -1}, "model.num_experts=-1 must not be negative"),
        ({"hidden_act": "gelu"}, "model.hidden_act=gelu must be silu, the only activation of Qwen"),
        ({"head_dim": 15}, "model.head_dim=15 must be even: rotary embeddings turn pairs"),
        (
            {"num_key_value_heads": 3},
            "model.num_key_value_heads=3 does not divide model.num_attention_heads=8; use a divisor",
        ),
        ({"num_experts_per_tok": 0}, "model.num_experts_per_tok=0 must be above 0 with model.num_experts=16"),
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
        (
            {"moe_intermediate_size": 0},
            "model.moe_intermediate_size=0 must be above 0 with model.num_experts=16",
        ),
    ],
)
def test_each_law(change: dict[str, Any], line: str) -> None:
    assert replace(MOE, **change).problems() == [line]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"shared_expert_intermediate_size": -1},
            "model.shared_expert_intermediate_size=-1 must not be negative",
        ),
        (
            {"shared_expert_intermediate_size": 0},
            "model.shared_expert_gate=True must be false where model.shared_expert_intermediate_size=0",
        ),
        (
            {"num_experts": 0},
            "model.shared_expert_intermediate_size=48 must be 0 in a dense model (model.num_experts=0)",
        ),
        (
            {"layer_types": ["full_attention"] * 3},
            "model.layer_types has 3 entries, which does not divide model.num_hidden_layers=8; "
            "write one per layer or a pattern",
        ),
        (
            {"layer_types": ["sliding_attention"]},
            "model.layer_types holds ['sliding_attention']; use full_attention and linear_attention",
        ),
        ({"linear_conv_kernel_dim": 0}, "model.linear_conv_kernel_dim=0 must be above 0"),
        (
            {"linear_num_key_heads": 3},
            "model.linear_num_key_heads=3 does not divide model.linear_num_value_heads=4; use a divisor",
        ),
        ({"partial_rotary_factor": 1.5}, "model.partial_rotary_factor=1.5 must be above 0 and at most 1"),
        (
            {"partial_rotary_factor": 0.2},
            "model.partial_rotary_factor=0.2 must select an even part of model.head_dim=16: "
            "rotary embeddings turn pairs",
        ),
        (
            {"rope_scaling": RopeScaling("yarn", 0.5, 64)},
            "model.rope_scaling.factor=0.5 must be at least 1: YaRN cannot shorten the context",
        ),
        (
            {"rope_scaling": RopeScaling("linear", 2.0, 64)},
            "model.rope_scaling.rope_type=linear must be yarn; or set model.rope_scaling=null",
        ),
        (
            {"rope_scaling": RopeScaling("yarn", 2.0, 1024)},
            "model.rope_scaling.original_max_position_embeddings=1024 must be above 0 and at most "
            "model.max_position_embeddings=256",
        ),
        (
            {"rope_scaling": RopeScaling("yarn", 2.0, 64, beta_fast=1.0)},
            "model.rope_scaling.beta_fast=1.0 must exceed beta_slow, which must be above 0",
        ),
    ],
)
def test_each_law_of_hybrids(change: dict[str, Any], line: str) -> None:
    assert replace(NEXT, **change).problems() == [line]


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


MIXED = replace(MOE, mlp_only_layers=[1], decoder_sparse_step=2)
LONGER = replace(MOE, rope_scaling=RopeScaling("yarn", 4.0, 64))
VARIANT = replace(MOE, shared_expert_intermediate_size=48)  # no gate: transformers has no such model


@pytest.mark.parametrize("config", [*FAMILY.values(), MIXED, LONGER, VARIANT])
def test_hf_round_trip(config: ModelConfig) -> None:
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("model_type", FAMILY)
def test_the_architecture_is_written(model_type: str) -> None:
    hf = FAMILY[model_type].to_hf()
    assert hf["model_type"] == model_type
    assert hf["architectures"] == [transformers_name(model_type)]
    assert ("num_experts" in hf) == bool(FAMILY[model_type].num_experts)
    assert hf["rope_theta"] == 10000.0
    assert VARIANT.to_hf()["model_type"] == "qwen_variant"


def transformers_name(model_type: str) -> str:
    return "".join(part.capitalize() for part in model_type.split("_")) + "ForCausalLM"


def test_a_dense_model_is_dense_whatever_its_other_expert_keys_say() -> None:
    dense = replace(DENSE, num_experts_per_tok=8, router_aux_loss_coef=0.1)
    assert dense.to_hf()["model_type"] == "qwen3"


def test_new_spelling_is_read() -> None:
    hf = LONGER.to_hf()
    hf["num_local_experts"] = hf.pop("num_experts")
    hf["rope_parameters"] = {**hf.pop("rope_scaling"), "rope_theta": hf.pop("rope_theta")}
    assert ModelConfig.from_hf(hf) == LONGER


def test_released_spellings() -> None:
    """Keys that released folders leave out have the defaults of transformers."""
    qwen2 = {
        k: v for k, v in QWEN2.to_hf().items() if k not in ("head_dim", "initializer_range", "hidden_act")
    }
    window = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 3}
    assert ModelConfig.from_hf({**qwen2, **window}) == replace(QWEN2, head_dim=8)
    unused = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 6}
    assert ModelConfig.from_hf({**qwen2, **unused}) == replace(QWEN2, head_dim=8)
    moe = {k: v for k, v in QWEN2_MOE.to_hf().items() if k not in ("mlp_only_layers", "qkv_bias")}
    assert ModelConfig.from_hf({**moe, "norm_topk_prob": None}) == replace(QWEN2_MOE, norm_topk_prob=False)
    hybrid = {k: v for k, v in NEXT.to_hf().items() if k not in ("layer_types", "partial_rotary_factor")}
    assert ModelConfig.from_hf({**hybrid, "full_attention_interval": 4}) == NEXT
    assert ModelConfig.from_hf({**hybrid, "full_attention_interval": 3}).layer_types == [
        "full_attention" if layer in (2, 5) else "linear_attention" for layer in range(8)
    ]


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"model_type": "llama"}, "model_type=llama is not supported; use one of qwen2, qwen3,"),
        ({"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        ({"layer_types": ["full_attention"] * 5}, "layer_types has 5 entries, but num_hidden_layers=6"),
        (
            {"layer_types": ["full_attention", "linear_attention"] * 3},
            "layer_types=['full_attention', 'linear_attention'] contradicts model_type=qwen3_moe",
        ),
        ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8 contradicts"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type=dynamic must be yarn"),
        ({"rope_scaling": {"type": "yarn"}}, "key rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "rope_scaling.factor=0.5 must be at least 1"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}},
            "rope_scaling.mscale=0.7 is not supported",
        ),
        ({"num_experts_per_tok": None}, "key num_experts_per_tok is missing"),
        ({"num_experts_per_tok": 17}, "model.num_experts_per_tok=17 must not exceed"),
        ({"num_key_value_heads": 3}, "model.num_key_value_heads=3 does not divide"),
    ],
)
def test_what_we_do_not_compute_is_refused(change: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf({**MOE.to_hf(), **change})
    assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"num_experts": "128"}, 'num_experts="128" must be an integer; correct it'),
        ({"num_experts": [128]}, "num_experts=[128] must be an integer; correct it"),
        ({"num_experts": 128.0}, "num_experts=128.0 must be an integer; correct it"),
        ({"num_local_experts": "8"}, 'num_local_experts="8" must be an integer; correct it'),
        ({"num_hidden_layers": True}, "num_hidden_layers=true must be an integer; correct it"),
        ({"rope_theta": "1e6"}, 'rope_theta="1e6" must be a finite number; correct it'),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=NaN must be a finite number; correct it"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1 must be true or false; correct it"),
        ({"use_sliding_window": "no"}, 'use_sliding_window="no" must be true or false; correct it'),
        ({"hidden_act": 3}, "hidden_act=3 must be a string; correct it"),
        (
            {"layer_types": "full_attention"},
            'layer_types="full_attention" must be a list of strings; correct it',
        ),
        ({"mlp_only_layers": 3}, "mlp_only_layers=3 must be a list of integers; correct it"),
        ({"mlp_only_layers": ["1"]}, 'mlp_only_layers=["1"] must be a list of integers; correct it'),
        ({"rope_scaling": ["yarn"]}, 'rope_scaling=["yarn"] must be a group of keys; correct it'),
        ({"rope_parameters": 5}, "rope_parameters=5 must be a group of keys; correct it"),
        (
            {"rope_scaling": {"type": "yarn", "factor": "4"}},
            'rope_scaling.factor="4" must be a finite number; correct it',
        ),
        ({"num_experts": None}, "key num_experts is missing; write it out"),
    ],
)
def test_mistyped_keys(change: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf({**MOE.to_hf(), **change})
    assert error.value.problems == [f"config.json: {line}"]


def test_all_mistyped_keys_at_once() -> None:
    broken = {key: {"a": 1} if key != "rope_scaling" else 1 for key in MOE.to_hf() if key in vars(MOE)}
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf({**MOE.to_hf(), **broken, "rope_scaling": 1})
    assert len(error.value.problems) == len(broken)


def test_multi_token_prediction_counts() -> None:
    ahead = replace(NEXT, num_nextn_predict_layers=1)
    assert (NEXT.num_moe_layers, ahead.num_moe_layers) == (8, 9)
    assert (ahead.layer_type(8), ahead.is_moe_layer(8)) == ("full_attention", True)
    assert ModelConfig.from_hf(ahead.to_hf()) == ahead
    assert replace(MOE, num_nextn_predict_layers=2).problems() == [
        "model.num_nextn_predict_layers=2 must be 0 or 1"
    ]
    attention = 6 * 8 * 16 * 100
    layer = ahead.num_active_parameters() - NEXT.num_active_parameters()
    more = ahead.flops_per_token(100) - NEXT.flops_per_token(100)
    assert more == 6 * (layer + 1000 * 64) + attention


def test_config_needs_no_torch() -> None:
    code = "import sys, moe.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
