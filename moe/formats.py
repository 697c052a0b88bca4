"""The config.json of each architecture: the values that model_type implies, the keys that may be left out.

The values are those of transformers' configuration and modelling files. Imports no torch.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

FULL, LINEAR = "full_attention", "linear_attention"  # the sequence mixers


@dataclass
class RopeScaling:
    """YaRN (arXiv 2309.00071): rotary embeddings for a context longer than the pretrained one."""

    rope_type: str  # yarn
    factor: float  # by which the context grows
    original_max_position_embeddings: int
    attention_factor: float | None = None  # of cosines and sines; null: 0.1 ln(factor) + 1
    beta_fast: float = 32.0  # a pair that turns more often in the original context keeps its frequency
    beta_slow: float = 1.0  # a pair that turns less often than this has its frequency divided by the factor


_Keys = dict[str, Any]


class Format(NamedTuple):
    """One model_type of transformers."""

    architecture: str
    fixed: _Keys  # our keys that the format does not have, with the only value it supports
    defaults: _Keys  # keys of the format that a config.json may leave out


# parts of `fixed`
_NO_SHARED_EXPERT = {"shared_expert_intermediate_size": 0, "shared_expert_gate": False}
_NO_EXPERTS: _Keys = {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}
_NO_EXPERTS |= {"norm_topk_prob": True, "router_aux_loss_coef": 0.0}
_NO_EXPERTS |= {"decoder_sparse_step": 1, "mlp_only_layers": [], **_NO_SHARED_EXPERT}
_PLAIN: _Keys = {"attn_output_gate": False, "partial_rotary_factor": 1.0, "zero_centered_norm": False}
_PLAIN |= {"layer_types": [FULL], "linear_num_key_heads": 0, "linear_num_value_heads": 0}
_PLAIN |= {"linear_key_head_dim": 0, "linear_value_head_dim": 0, "linear_conv_kernel_dim": 0}
_QWEN2 = {**_PLAIN, "use_qk_norm": False, "attention_bias": False}
_QWEN3 = {**_PLAIN, "use_qk_norm": True, "qkv_bias": False}
_NEXT: _Keys = {"use_qk_norm": True, "qkv_bias": False, "attn_output_gate": True}
_NEXT |= {"zero_centered_norm": True, "shared_expert_gate": True}

# parts of `defaults`
_ANY: _Keys = {"hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6}
_ANY |= {"rope_theta": 10_000.0, "tie_word_embeddings": False, "attention_bias": False, "qkv_bias": True}
_ANY |= {"num_nextn_predict_layers": 0}
_MOE: _Keys = {**_ANY, "norm_topk_prob": False, "router_aux_loss_coef": 0.001}
_MOE |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
_HYBRID: _Keys = {**_MOE, "norm_topk_prob": True, "head_dim": 256}
_HYBRID |= {"partial_rotary_factor": 0.25, "full_attention_interval": 4}

FORMATS = {
    "qwen2": Format("Qwen2ForCausalLM", {**_QWEN2, **_NO_EXPERTS, "qkv_bias": True}, _ANY),
    "qwen3": Format("Qwen3ForCausalLM", {**_QWEN3, **_NO_EXPERTS}, {**_ANY, "head_dim": 128}),
    "qwen2_moe": Format("Qwen2MoeForCausalLM", {**_QWEN2, "shared_expert_gate": True}, _MOE),
    "qwen3_moe": Format("Qwen3MoeForCausalLM", {**_QWEN3, **_NO_SHARED_EXPERT}, _MOE),
    "qwen3_next": Format("Qwen3NextForCausalLM", _NEXT, _HYBRID),
    # any other combination of keys, which this project can read back and transformers cannot
    "qwen_variant": Format("QwenVariantForCausalLM", {}, {"num_nextn_predict_layers": 0}),
}

MTP_FORMATS = ("qwen3_next", "qwen_variant")  # formats whose folders may hold the tensors mtp.*

# `quantization_config` of the released folders in FP8 (see moe/fp8.py); its other keys change nothing here.
FP8: _Keys = {"quant_method": "fp8", "weight_block_size": [128, 128]}

# Further keys of the released config.json files, with equal values in all of them.
RELEASED: _Keys = {
    "attention_dropout": 0.0,
    "sliding_window": None,
    "use_cache": True,
    "use_sliding_window": False,
    "transformers_version": "4.57.0",  # the first version that knows all released formats
}


# Types of the keys that ModelConfig does not have or has in another form; names of the types in messages.
_KINDS: _Keys = dict.fromkeys(("num_local_experts", "full_attention_interval", "max_window_layers"), int)
_KINDS |= {"rope_scaling": dict, "rope_parameters": dict, "use_sliding_window": bool, "type": str}
_KINDS |= {**RopeScaling.__annotations__, "attention_factor": float}
_NAMES: dict[Any, str] = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}
_NAMES |= {dict: "a group of keys", list[int]: "a list of integers", list[str]: "a list of strings"}


def mistyped(hf: Mapping[str, Any], hints: Mapping[str, Any], group: str = "") -> list[str]:
    """A line for each key of a config.json, or of a group in it, that has a wrong type and is not null."""
    found, kinds = [], {**hints, **_KINDS}
    for key in [key for key, value in hf.items() if key in kinds and value is not None]:
        if not _is_of(hf[key], kinds[key]):
            shown, kind = json.dumps(hf[key]), _NAMES[kinds[key]]
            found.append(f"config.json: {group}{key}={shown} must be {kind}; correct it")
        elif kinds[key] is dict:
            found += mistyped(hf[key], hints, f"{key}.")
    return found


def _is_of(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    if kind in (list[int], list[str]):
        return isinstance(value, list) and all(type(item) is kind.__args__[0] for item in value)
    return type(value) is kind


def format_of(values: Mapping[str, Any]) -> str:
    """The first model_type that supports a model with these keys."""
    # a dense model ignores the other keys of experts
    meant = values if values["num_experts"] else {**values, **_NO_EXPERTS}
    return next(
        name
        for name, form in FORMATS.items()
        if all(meant[key] == value for key, value in form.fixed.items())
    )


def read_values(hf: Mapping[str, Any]) -> tuple[_Keys, list[str]]:
    """The keys of a config.json, as transformers 4 or 5 spells them, with the values that its format implies.

    Also returns one line for each value that is not supported. A null counts as absent.
    """
    model_type = str(hf.get("model_type"))
    form = FORMATS.get(model_type)
    if form is None:
        known = ", ".join(FORMATS)
        return {}, [f"config.json: model_type={model_type} is not supported; use one of {known}"]
    given = {key: value for key, value in hf.items() if value is not None}
    values, found = {**form.defaults, **form.fixed, **given}, _quantised(given)
    layers = values.get("num_hidden_layers", 0)
    if "layer_types" in given:
        if (entries := len(given["layer_types"])) != layers:
            found.append(
                f"config.json: layer_types has {entries} entries, but num_hidden_layers={layers}; "
                "write one for each layer"
            )
        values["layer_types"] = _pattern(given["layer_types"])
    elif interval := values.get("full_attention_interval"):
        numbers = range(1, layers + 1)
        values["layer_types"] = _pattern([LINEAR if n % interval else FULL for n in numbers])
    if "num_local_experts" in values:
        values.setdefault("num_experts", values["num_local_experts"])
    if values.get("num_attention_heads"):
        values.setdefault("head_dim", values.get("hidden_size", 0) // values["num_attention_heads"])
    found += _take_rope(values)
    # A sliding window applies from layer max_window_layers on in dense formats, in others to any layer.
    first = values.get("max_window_layers", 0) if form.fixed.get("num_experts") == 0 else 0
    if values.get("use_sliding_window") and first < layers:
        found.append("config.json: use_sliding_window=true is not supported; use full attention")
    for key, value in form.fixed.items():
        if values[key] != value:
            found.append(f"config.json: {key}={values[key]} contradicts model_type={model_type}; remove it")
    return {**values, **form.fixed}, found


def _quantised(hf: Mapping[str, Any]) -> list[str]:
    """What is wrong with the quantisation of a folder: only that of `FP8` can be undone here."""
    given = hf.get("quantization_config", hf.get("compression_config"))
    if given is None or (isinstance(given, dict) and FP8.items() <= given.items()):
        return []
    method = given.get("quant_method", "an unknown method") if isinstance(given, dict) else given
    what = f"config.json: the weights are quantised ({method}), and only fp8 with blocks of 128 x 128 is read"
    return [f"{what}; name the folder of the weights that were quantised"]


def _pattern(layer_types: list[str]) -> list[str]:
    """The shortest list that gives these entries when it is repeated."""
    for length in range(1, len(layer_types)):
        repeats, rest = divmod(len(layer_types), length)
        if not rest and layer_types[:length] * repeats == layer_types:
            return layer_types[:length]
    return layer_types


def _take_rope(values: _Keys) -> list[str]:
    """Set rope_theta, partial_rotary_factor and rope_scaling from either spelling; returns problems."""
    parts = (values.pop("rope_scaling", {}), values.pop("rope_parameters", {}))
    rope = {key: value for part in parts for key, value in part.items() if value is not None}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            values[key] = rope.pop(key)
    old = rope.pop("type", "default")
    values["rope_scaling"] = None
    if rope.setdefault("rope_type", old) == "default":
        return []
    rope.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    known = {field.name for field in fields(RopeScaling)}
    if "factor" not in rope:
        return ["config.json: key rope_scaling.factor is missing; write it out"]
    values["rope_scaling"] = RopeScaling(**{key: rope[key] for key in rope.keys() & known})
    extra = sorted(rope.keys() - known)
    return [f"config.json: rope_scaling.{key}={rope[key]} is not supported; remove it" for key in extra]
