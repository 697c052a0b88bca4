"""The work that every contender of the benchmark does."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

LEARNING_RATE = 1e-4
BETAS, EPS, DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclass(frozen=True)
class Work:
    """The work of a contender; the defaults are the reference work."""

    dtype: str = "bf16"
    rows: int = 4  # of all ranks together, in a micro-batch
    seq_len: int = 1024
    document: int = 1024  # tokens of each document
    layers: int = 4
    hidden: int = 512
    heads: int = 8
    key_value_heads: int = 2
    head_dim: int = 64
    experts: int = 128
    top_k: int = 8
    width: int = 192  # of one expert
    vocab: int = 8192
    backend: str = "loop"  # ours: experts.backend
    recompute: str = "none"  # ours
    micro_batches: int = 1  # of a step
    chunks: int = 1  # ours: parallel.dispatch_chunks
    zero_stage: int = 0  # ours, AutoEP
    parts: int = 0  # ours: 1 to time the parts of the last step
    warm_up: int = 3  # until then malloc asks for fresh pages in every step
    steps: int = 2

    @classmethod
    def parse(cls, overrides: list[str]) -> "Work":
        """Parse `key=value` strings; each value gets the type of the field's default."""
        kinds = {field.name: type(field.default) for field in fields(cls)}
        pairs = (item.split("=", 1) for item in overrides)
        return cls(**{key: kinds[key](value) for key, value in pairs})

    def model_keys(self) -> dict[str, Any]:
        """The shape of the model under Hugging Face's keys."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_dim,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.width,
            "norm_topk_prob": True,
            "router_aux_loss_coef": 0.001,
            "tie_word_embeddings": False,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
        }

    def tokens(self, rank: int, world_size: int) -> Tensor:
        """This rank's rows [B, S+1] on its device; the same for every contender."""
        generator = torch.Generator().manual_seed(0)
        everything = torch.randint(0, self.vocab, (self.rows, self.seq_len + 1), generator=generator)
        share = self.rows // world_size
        return everything[rank * share : (rank + 1) * share].to(device())

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.dtype]


def device() -> torch.device:
    """The GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
