"""The shape of a model: the keys of Hugging Face's config.json and their laws. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from moe.formats import FORMATS, FULL, LINEAR, RELEASED, RopeScaling, format_of, mistyped, read_values


class ConfigError(ValueError):
    """The user's configuration is wrong. `problems` holds one line per broken law; so does `str()`."""

    def __init__(self, problems: list[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("\n".join(self.problems))


@dataclass
class ModelConfig:
    """Any Qwen from 2 to 3-Next; `num_experts=0` is a dense model. The values live in conf/model/*.yaml."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of the dense MLP layers
    num_hidden_layers: int
    hidden_act: str
    max_position_embeddings: int
    initializer_range: float
    rms_norm_eps: float
    zero_centered_norm: bool  # norms multiply by 1 + weight
    tie_word_embeddings: bool
    layer_types: list[str]  # the sequence mixer of each layer, or a pattern that repeats
    # full attention
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool
    attention_bias: bool  # of query, key, value and output
    use_qk_norm: bool  # RMSNorm of every query and key head
    attn_output_gate: bool  # a sigmoid gate per value, projected beside the query
    rope_theta: float
    rope_scaling: RopeScaling | None
    partial_rotary_factor: float  # share of head_dim that is rotated
    # linear attention: Gated DeltaNet
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    # mixture of experts
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int  # of one expert
    norm_topk_prob: bool
    router_aux_loss_coef: float
    decoder_sparse_step: int  # layer i is sparse if (i + 1) is a multiple of it
    mlp_only_layers: list[int]  # layers that are dense, whatever decoder_sparse_step says
    shared_expert_intermediate_size: int  # of the expert that takes every token; 0 = no such expert
    shared_expert_gate: bool  # a sigmoid gate on its output
    num_nextn_predict_layers: int  # of multi-token prediction: 0 or 1

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0) is a mixture of experts; num_hidden_layers = MTP's layer."""
        if self.num_experts == 0:
            return False
        placed = layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        return placed or layer == self.num_hidden_layers

    def unaligned_keys(self, bytes_per_value: int) -> list[str]:
        """Sizes whose rows are not a multiple of 16 bytes; torch's grouped product requires that they are."""
        sizes = ("hidden_size", "moe_intermediate_size")
        return [key for key in sizes if getattr(self, key) * bytes_per_value % 16]

    def layer_type(self, layer: int) -> str:
        """The sequence mixer of decoder layer `layer` (from 0); num_hidden_layers = MTP's layer."""
        return FULL if layer == self.num_hidden_layers else self.layer_types[layer % len(self.layer_types)]

    @property
    def moe_layers(self) -> list[int]:
        """Numbers of the mixture-of-experts layers, ascending."""
        return [layer for layer in range(self.num_hidden_layers) if self.is_moe_layer(layer)]

    @property
    def num_moe_layers(self) -> int:
        """Number of layers with a router; the layer of multi-token prediction counts and comes last."""
        return len(self.moe_layers) + (self.num_nextn_predict_layers if self.num_experts else 0)

    @property
    def rotary_dim(self) -> int:
        """Number of values of each head that rotary embeddings rotate."""
        return int(self.head_dim * self.partial_rotary_factor)

    def problems(self) -> list[str]:
        """Every broken law, one line each, keys written as `model.<key>`; empty for a sound configuration."""
        sizes = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
        sizes += ["num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta"]
        sparse = ["moe_intermediate_size", "num_experts_per_tok", "decoder_sparse_step"]
        if LINEAR in self.layer_types:
            sizes += [field.name for field in fields(self) if field.name.startswith("linear_")]
        found = [_must(self, key, "be above 0") for key in sizes if not getattr(self, key) > 0]
        if self.num_experts > 0:
            law = f"be above 0 with model.num_experts={self.num_experts}"
            found += [_must(self, key, law) for key in sparse if not getattr(self, key) > 0]
        not_negative = ["num_experts", "initializer_range", "router_aux_loss_coef"]
        not_negative.append("shared_expert_intermediate_size")
        found += [_must(self, key, "not be negative") for key in not_negative if not getattr(self, key) >= 0]
        if self.num_hidden_layers > 10_000:
            found.append(_must(self, "num_hidden_layers", "be at most 10000"))
        if self.num_experts >= 2**15:
            found.append(_must(self, "num_experts", "be below 32768: ranks send their numbers in 16 bits"))
        if self.num_nextn_predict_layers not in (0, 1):
            found.append(_must(self, "num_nextn_predict_layers", "be 0 or 1"))
        if self.hidden_act != "silu":
            found.append(_must(self, "hidden_act", "be silu, the only activation of Qwen"))
        found += _divides(self, "num_key_value_heads", "num_attention_heads")
        if LINEAR in self.layer_types:
            found += _divides(self, "linear_num_key_heads", "linear_num_value_heads")
        return found + self._rotary_problems() + (self._layer_problems() if not found else [])

    def _rotary_problems(self) -> list[str]:
        """Laws of the rotary embeddings."""
        found = []
        if not 0 < self.partial_rotary_factor <= 1:
            found.append(_must(self, "partial_rotary_factor", "be above 0 and at most 1"))
        elif self.partial_rotary_factor == 1 and self.head_dim % 2:
            found.append(_must(self, "head_dim", "be even: rotary embeddings turn pairs"))
        elif self.rotary_dim % 2 or self.rotary_dim == 0:
            law = f"select an even part of model.head_dim={self.head_dim}: rotary embeddings turn pairs"
            found.append(_must(self, "partial_rotary_factor", law))
        if (scaling := self.rope_scaling) is not None:
            if 0 < self.rope_theta <= 1:
                found.append(_must(self, "rope_theta", "be above 1 where model.rope_scaling is set"))
            original, limit = scaling.original_max_position_embeddings, self.max_position_embeddings
            falling = scaling.beta_fast > scaling.beta_slow > 0
            within = f"be above 0 and at most model.max_position_embeddings={limit}"
            for key, sound, law in [
                ("rope_type", scaling.rope_type == "yarn", "be yarn; or set model.rope_scaling=null"),
                ("factor", scaling.factor >= 1, "be at least 1: YaRN cannot shorten the context"),
                ("beta_fast", falling, "exceed beta_slow, which must be above 0"),
                ("original_max_position_embeddings", 0 < original <= limit, within),
            ]:
                if not sound:
                    found.append(f"model.rope_scaling.{key}={getattr(scaling, key)} must {law}")
        return found

    def _layer_problems(self) -> list[str]:
        """Laws of the layer pattern and the experts; they presuppose the laws of the single keys."""
        found = []
        if unknown := sorted(set(self.layer_types) - {FULL, LINEAR}):
            found.append(f"model.layer_types holds {unknown}; use {FULL} and {LINEAR}")
        if not self.layer_types or self.num_hidden_layers % len(self.layer_types):
            found.append(
                f"model.layer_types has {len(self.layer_types)} entries, which does not divide "
                f"model.num_hidden_layers={self.num_hidden_layers}; write one per layer or a pattern"
            )
        if self.num_experts_per_tok > self.num_experts > 0:
            law = f"not exceed model.num_experts={self.num_experts}"
            found.append(_must(self, "num_experts_per_tok", law))
        outside = [layer for layer in self.mlp_only_layers if not 0 <= layer < self.num_hidden_layers]
        if outside:
            found.append(
                f"model.mlp_only_layers={self.mlp_only_layers} names layers {outside}; "
                f"layers run from 0 to {self.num_hidden_layers - 1}"
            )
        if self.num_experts > 0 and not self.moe_layers:
            found.append(
                f"model.decoder_sparse_step={self.decoder_sparse_step} and model.mlp_only_layers="
                f"{self.mlp_only_layers} leave no sparse layer; set model.num_experts=0 for a dense model"
            )
        if len(self.moe_layers) < self.num_hidden_layers and self.intermediate_size <= 0:
            found.append(_must(self, "intermediate_size", "be above 0: the model has dense layers"))
        if self.shared_expert_intermediate_size and not self.num_experts:
            law = "be 0 in a dense model (model.num_experts=0)"
            found.append(_must(self, "shared_expert_intermediate_size", law))
        if self.shared_expert_gate and not self.shared_expert_intermediate_size:
            law = "be false where model.shared_expert_intermediate_size=0"
            found.append(_must(self, "shared_expert_gate", law))
        return found

    def num_parameters(self) -> int:
        """Parameters of the whole model; a tied embedding counts once."""
        return self._count(experts=self.num_experts)

    def num_active_parameters(self) -> int:
        """Parameters that one token uses: `num_experts_per_tok` experts per sparse layer."""
        return self._count(experts=self.num_experts_per_tok)

    def num_expert_parameters(self) -> int:
        """Parameters of all routed experts, which expert parallelism distributes over ranks."""
        return self._count(experts=self.num_experts) - self._count(experts=0)

    def _count(self, experts: int) -> int:
        """Parameters with `experts` routed experts in each sparse layer."""
        hidden, shared = self.hidden_size, self.shared_expert_intermediate_size
        sparse = hidden * (self.num_experts + 3 * experts * self.moe_intermediate_size + 3 * shared)
        sparse += hidden if self.shared_expert_gate else 0
        dense = 3 * hidden * self.intermediate_size
        layers = sum(
            self._count_mixer(layer) + 2 * hidden + (sparse if self.is_moe_layer(layer) else dense)
            for layer in range(self.num_hidden_layers + self.num_nextn_predict_layers)
        )
        layers += self.num_nextn_predict_layers * (2 * hidden + 3) * hidden  # its projection and norms
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return embeddings + layers + hidden

    def _count_mixer(self, layer: int) -> int:
        """Parameters of the sequence mixer of a layer."""
        if self.layer_type(layer) == LINEAR:
            key = self.linear_num_key_heads * self.linear_key_head_dim
            value = self.linear_num_value_heads * self.linear_value_head_dim
            projections = self.hidden_size * (2 * key + 3 * value + 2 * self.linear_num_value_heads)
            convolution = self.linear_conv_kernel_dim * (2 * key + value)
            return projections + convolution + 2 * self.linear_num_value_heads + self.linear_value_head_dim
        value = self.num_attention_heads * self.head_dim
        inputs = value * (2 if self.attn_output_gate else 1) + 2 * self.num_key_value_heads * self.head_dim
        biases = inputs if self.qkv_bias or self.attention_bias else 0
        biases += self.hidden_size if self.attention_bias else 0
        return self.hidden_size * (inputs + value) + biases + (2 * self.head_dim if self.use_qk_norm else 0)

    def flops_per_token(self, seq_len: int) -> float:
        """Training FLOPs (forward and backward) of one token in a causal sequence of `seq_len` tokens.

        6 per active parameter in a matrix product (all but the input embedding, which is a look-up; a tied
        matrix counts, as the head), plus 6 x heads x head_dim x seq_len per layer of full attention (causal:
        half of the square), plus 18 x heads x key dim x value dim per layer of linear attention (to read,
        write and query its state). Multi-token prediction adds its layer and the head a second time.
        Recompute does not count (model FLOPs, PaLM, arXiv 2204.02311, appendix B).
        """
        look_up = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        state = self.linear_num_value_heads * self.linear_key_head_dim * self.linear_value_head_dim
        mixing = {FULL: self.num_attention_heads * self.head_dim * seq_len, LINEAR: 3 * state}
        ahead = self.num_nextn_predict_layers
        mixed = sum(mixing[self.layer_type(layer)] for layer in range(self.num_hidden_layers + ahead))
        heads = ahead * self.vocab_size * self.hidden_size
        return 6.0 * (self.num_active_parameters() - look_up + heads + mixed)

    @classmethod
    def of_folder(cls, folder: Path) -> "ModelConfig":
        """Read config.json of a Hugging Face folder. Raises ConfigError as `from_hf`, or if unreadable."""
        if (folder / "adapter_config.json").is_file() and not any(folder.glob("model*.safetensors")):
            what = f"{folder} holds an adapter, which is no model"
            raise ConfigError(f"{what}; merge it into its base model (merge_and_unload of peft)")
        try:
            return cls.from_hf(dict(json.loads((folder / "config.json").read_text())))
        except ConfigError:
            raise
        except (OSError, ValueError, TypeError, RecursionError) as error:
            what = f"{folder} is not a Hugging Face folder"
            raise ConfigError(
                f"{what}: config.json cannot be read ({error}); name one that has it"
            ) from error

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """Read the keys of a config.json of a format in `moe.formats`, as transformers 4 or 5 spells them.

        Raises ConfigError for missing and mistyped keys, for features this model does not compute, and for
        broken laws.
        """
        if found := mistyped(hf, get_type_hints(cls)):
            raise ConfigError(found)
        values, found = read_values(hf)
        names = [field.name for field in fields(cls)]
        if values:
            absent = [name for name in names if name not in values]
            found += [f"config.json: key {name} is missing; write it out" for name in absent]
        if found:
            raise ConfigError(found)
        config = cls(**{name: values[name] for name in names})
        if found := config.problems():
            raise ConfigError(found)
        return config

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this model, in the older keys of the released files, which all programs read."""
        values = asdict(self)
        model_type = format_of(values)
        architecture, fixed, _ = FORMATS[model_type]
        repeats = self.num_hidden_layers // len(self.layer_types)
        keys = {**values, "layer_types": self.layer_types * repeats}
        kept = {key: value for key, value in keys.items() if key not in fixed}
        if not self.num_nextn_predict_layers:
            del kept["num_nextn_predict_layers"]  # the released config.json files do not have it
        return {"architectures": [architecture], "model_type": model_type, **RELEASED, **kept}


def _must(config: ModelConfig, key: str, law: str) -> str:
    return f"model.{key}={getattr(config, key)} must {law}"


def _divides(config: ModelConfig, key: str, of: str) -> list[str]:
    divisor, number = getattr(config, key), getattr(config, of)
    if divisor > 0 and number % divisor:
        return [f"model.{key}={divisor} does not divide model.{of}={number}; use a divisor"]
    return []
