"""The shape of a Qwen3 model: the keys of Hugging Face's config.json and their laws. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """The user's configuration is wrong. `problems` holds one line per broken law; so does `str()`."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass
class ModelConfig:
    """Qwen3 (arXiv 2505.09388); `num_experts=0` is a dense model. The values live in conf/model/*.yaml."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of the dense MLP layers
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    max_position_embeddings: int
    initializer_range: float
    rms_norm_eps: float
    rope_theta: float
    attention_bias: bool
    tie_word_embeddings: bool
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int  # of one expert
    norm_topk_prob: bool
    router_aux_loss_coef: float
    decoder_sparse_step: int  # layer i is sparse if (i + 1) is a multiple
    mlp_only_layers: list[int]  # layers that stay dense all the same

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0) is a mixture of experts."""
        return (
            self.num_experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    @property
    def moe_layers(self) -> list[int]:
        """Numbers of the mixture-of-experts layers, ascending."""
        return [layer for layer in range(self.num_hidden_layers) if self.is_moe_layer(layer)]

    def problems(self) -> list[str]:
        """Every broken law, one line each, keys written as `model.<key>`; empty for a sound configuration."""
        sizes = [
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        ]
        sizes += ["head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta"]
        if self.num_experts > 0:
            sizes += ["moe_intermediate_size", "num_experts_per_tok", "decoder_sparse_step"]
        found = [_must(self, key, "be above 0") for key in sizes if getattr(self, key) <= 0]
        not_negative = ["num_experts", "initializer_range", "router_aux_loss_coef"]
        found += [_must(self, key, "not be negative") for key in not_negative if getattr(self, key) < 0]
        if self.hidden_act != "silu":
            found.append(_must(self, "hidden_act", "be silu, the only activation of Qwen3"))
        if self.head_dim % 2:
            found.append(_must(self, "head_dim", "be even: rotary embeddings turn pairs"))
        if self.num_key_value_heads > 0 and self.num_attention_heads % self.num_key_value_heads:
            found.append(
                f"model.num_key_value_heads={self.num_key_value_heads} does not divide "
                f"model.num_attention_heads={self.num_attention_heads}; use a divisor"
            )
        return found + (self._sparse_problems() if not found else [])

    def _sparse_problems(self) -> list[str]:
        """Laws of the layer pattern; they presuppose the laws of the single keys."""
        found = []
        if self.num_experts_per_tok > self.num_experts > 0:
            found.append(
                _must(self, "num_experts_per_tok", f"not exceed model.num_experts={self.num_experts}")
            )
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
        return found

    def num_parameters(self) -> int:
        """Parameters of the whole model; a tied embedding counts once."""
        return self._count(experts=self.num_experts)

    def num_active_parameters(self) -> int:
        """Parameters that one token uses: `num_experts_per_tok` experts per sparse layer."""
        return self._count(experts=self.num_experts_per_tok)

    def _count(self, experts: int) -> int:
        """Parameters with `experts` experts in each sparse layer."""
        hidden, query = self.hidden_size, self.num_attention_heads * self.head_dim
        key_value = 2 * self.num_key_value_heads * self.head_dim
        attention = hidden * (2 * query + key_value) + 2 * self.head_dim
        if self.attention_bias:
            attention += query + key_value + hidden
        sparse = self.num_experts * hidden + 3 * experts * hidden * self.moe_intermediate_size
        dense = 3 * hidden * self.intermediate_size
        sparse_layers = len(self.moe_layers)
        layers = self.num_hidden_layers * (attention + 2 * hidden)
        layers += sparse_layers * sparse + (self.num_hidden_layers - sparse_layers) * dense
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return embeddings + layers + hidden

    def flops_per_token(self, seq_len: int) -> float:
        """Training FLOPs (forward and backward) of one token in a causal sequence of `seq_len` tokens.

        6 per active parameter that multiplies (all but the input embedding, a look-up; a tied matrix does, as
        the head) plus 6 x layers x heads x head_dim x seq_len for attention, half of the square.
        Recompute does not count (model FLOPs, PaLM, arXiv 2204.02311, appendix B).
        """
        look_up = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        attention = self.num_hidden_layers * self.num_attention_heads * self.head_dim * seq_len
        return 6.0 * (self.num_active_parameters() - look_up + attention)

    @classmethod
    def of_folder(cls, folder: Path) -> "ModelConfig":
        """Of a Hugging Face folder. Raises ConfigError as `from_hf`, and where config.json cannot be read."""
        try:
            values = dict(json.loads((folder / "config.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                [f"{folder} is no Hugging Face folder: config.json cannot be read ({error})"]
            ) from error
        return cls.from_hf(values)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """From a config.json of model_type qwen3 or qwen3_moe, in the spelling of transformers 4 or 5.

        Raises ConfigError for missing keys, for features this model does not compute, and for broken laws.
        """
        values = dict(hf)
        values.setdefault("rope_theta", (hf.get("rope_parameters") or {}).get("rope_theta"))
        if hf.get("model_type") == "qwen3_moe":
            values.setdefault("num_experts", hf.get("num_local_experts"))
        else:
            values.update(_DENSE)
        found = _unsupported(hf)
        names = [field.name for field in fields(cls)]
        found += [
            f"config.json: key {name} is missing; write it out" for name in names if values.get(name) is None
        ]
        if found:
            raise ConfigError(found)
        config = cls(**{name: values[name] for name in names})
        found = config.problems()
        if found:
            raise ConfigError(found)
        return config

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this model, in the older keys of the released ones, which every reader takes."""
        moe = self.num_experts > 0
        keys = {key: value for key, value in asdict(self).items() if moe or key not in _DENSE}
        return {
            "architectures": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"],
            "model_type": "qwen3_moe" if moe else "qwen3",
            **_RELEASED,
            **keys,
        }


# The keys that a dense config.json does not have, and what they are there.
_DENSE: dict[str, Any] = {
    "num_experts": 0,
    "num_experts_per_tok": 0,
    "moe_intermediate_size": 0,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

# What the released config.json files say besides, the same in all of them.
_RELEASED: dict[str, Any] = {
    "attention_dropout": 0.0,
    "rope_scaling": None,
    "sliding_window": None,
    "use_cache": True,
    "use_sliding_window": False,
    "transformers_version": "4.51.0",  # the first that knows Qwen3
}


def _must(config: ModelConfig, key: str, law: str) -> str:
    return f"model.{key}={getattr(config, key)} must {law}"


def _unsupported(hf: Mapping[str, Any]) -> list[str]:
    """What a config.json asks for and this model does not compute."""
    found = []
    if hf.get("model_type") not in ("qwen3", "qwen3_moe"):
        found.append(
            f"config.json: model_type={hf.get('model_type')} is not supported; use qwen3 or qwen3_moe"
        )
    if hf.get("use_sliding_window"):
        found.append("config.json: use_sliding_window=true is not supported; use full attention")
    layer_types = set(hf.get("layer_types") or []) - {"full_attention"}
    if layer_types:
        found.append(
            f"config.json: layer_types holds {sorted(layer_types)}; only full_attention is supported"
        )
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        found.append(f"config.json: rope_type={rope_type} is not supported; remove rope_scaling")
    return found
