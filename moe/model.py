"""The language model, dense or sparse: arithmetic on one rank, modules named as in Hugging Face."""
# B rows, S tokens per row, T = B*S tokens, D documents, H hidden, V vocabulary, L sparse layers

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.attention import Attention, Cache, Documents
from moe.block import MoEBlock
from moe.config import ConfigError, ModelConfig
from moe.cross_entropy import chunked_cross_entropy
from moe.formats import FULL, LINEAR
from moe.gated_delta_net import GatedDeltaNet
from moe.mlp import MLP
from moe.norm import rms_norm
from moe.rope import rotary_tables
from moe.router import RouterStatistics, stack_statistics

RECOMPUTE = ("none", "experts", "full")


class ModelOutput(NamedTuple):
    """What one forward gives, as values: the modules keep no state."""

    logits: Tensor | None  # [B, S, V], where no labels were given
    cross_entropy_sum: Tensor | None  # scalar fp32, sum over labels != -100, where labels were given
    router: RouterStatistics | None  # stacked over the L sparse layers; None for a dense model


# the sequence mixers: the name of the module in a layer, and its class
MIXERS: dict[str, tuple[str, type[Attention] | type[GatedDeltaNet]]] = {
    FULL: ("self_attn", Attention),
    LINEAR: ("linear_attn", GatedDeltaNet),
}


class DecoderLayer(nn.Module):
    """Sequence mixer and feed-forward, each normed before and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, backend: str, recompute: str) -> None:
        super().__init__()
        self.recompute_experts = recompute == "experts"
        self.input_layernorm = rms_norm(config, config.hidden_size)
        self.mixer, mixer_class = MIXERS[config.layer_type(layer)]
        self.add_module(self.mixer, mixer_class(config, layer))
        self.post_attention_layernorm = rms_norm(config, config.hidden_size)
        self.mlp: MoEBlock | MLP
        if config.is_moe_layer(layer):
            self.mlp = MoEBlock(config, backend)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        documents: Documents,
        token_mask: Tensor | None,
        cache: Cache | None,
        selection_bias: Tensor | None,
    ) -> tuple[Tensor, RouterStatistics | None]:
        """hidden [B, S, H] -> [B, S, H] and, from a sparse layer, its router statistics."""
        mix = getattr(self, self.mixer)
        hidden = hidden + mix(self.input_layernorm(hidden), rotary, documents, cache)
        normed = self.post_attention_layernorm(hidden)
        update, statistics = _call(
            self._feed_forward, normed, token_mask, selection_bias, recompute=self.recompute_experts
        )
        return hidden + update, statistics

    def _feed_forward(
        self, hidden: Tensor, token_mask: Tensor | None, selection_bias: Tensor | None
    ) -> tuple[Tensor, RouterStatistics | None]:
        if isinstance(self.mlp, MoEBlock):
            return self.mlp(hidden, token_mask, selection_bias)
        return self.mlp(hidden), None


class Decoder(nn.Module):
    """Token embedding, decoder layers and the final norm."""

    def __init__(self, config: ModelConfig, backend: str, recompute: str) -> None:
        super().__init__()
        self.config = config
        self.recompute_layers = recompute == "full"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, backend, recompute) for layer in range(config.num_hidden_layers)
        )
        self.norm = rms_norm(config, config.hidden_size)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        token_mask: Tensor | None,
        cache: Cache | None,
        selection_bias: Tensor | None,
    ) -> tuple[Tensor, RouterStatistics | None]:
        """[B, S] ids -> hidden states [B, S, H] after the final norm, and the statistics of all routers."""
        hidden = self.embed_tokens(input_ids)  # [B, S, H]
        documents = Documents(cu_seqlens)
        rotary = rotary_tables(position_ids.flatten(), self.config, hidden.dtype)
        per_layer: list[RouterStatistics] = []
        for layer in self.layers:
            bias = None if selection_bias is None else selection_bias[len(per_layer)]  # a row each
            hidden, statistics = _call(
                layer, hidden, rotary, documents, token_mask, cache, bias, recompute=self.recompute_layers
            )
            if statistics is not None:
                per_layer.append(statistics)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.norm(hidden), stack_statistics(per_layer) if per_layer else None


class LanguageModelHead(nn.Linear):
    """hidden [B, S, H] -> logits [B, S, V], or with labels [B, S] -> the summed cross entropy.

    The loss lives in here because ZeRO-3 gathers parameters for the module that is called.
    """

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return F.linear(hidden, self.weight)
        return chunked_cross_entropy(hidden.flatten(0, 1), self.weight, labels.flatten())


class CausalLM(nn.Module):
    """The language model. `backend` computes the experts; `recompute` names what the backward computes again.

    recompute: "none"; "experts", every feed-forward; "full", every decoder layer.
    Raises ConfigError for a broken configuration.
    """

    def __init__(self, config: ModelConfig, *, backend: str = "loop", recompute: str = "none") -> None:
        super().__init__()
        found = config.problems()
        if recompute not in RECOMPUTE:
            found.append(f"recompute={recompute} is unknown; use {', '.join(RECOMPUTE)}")
        if found:
            raise ConfigError(found)
        self.config = config
        self.model = Decoder(config, backend, recompute)
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size, bias=False)
        self._tie()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        token_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        selection_bias: Tensor | None = None,
        routing_only: bool = False,
    ) -> ModelOutput:
        """Logits, or with labels the summed cross entropy; and the router statistics.

        input_ids, position_ids [B, S] int64; cu_seqlens [D+1] int32, borders of the documents over T tokens.
        token_mask [B, S] bool: False keeps a token (padding) out of the router statistics.
        labels [B, S] int64, already shifted, -100 = no loss.
        cache: the tokens go on where its rows ended; one sequence per row, and position_ids say so.
        selection_bias [L, E] fp32: added to the routers' scores for the choice of experts only.
        routing_only: the router statistics are all that is wanted; the head does not run.
        Ids must lie in the vocabulary: nothing checks them here.
        """
        hidden, router = self.model(input_ids, position_ids, cu_seqlens, token_mask, cache, selection_bias)
        if routing_only:
            return ModelOutput(None, None, router)
        if labels is None:
            return ModelOutput(self.lm_head(hidden), None, router)
        return ModelOutput(None, self.lm_head(hidden, labels), router)

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # Leaving the meta device replaces every parameter, which would part the tied two.
        super()._apply(fn, recurse)
        self._tie()
        return self


def _call(function: Callable[..., Any], *arguments: Any, recompute: bool) -> Any:
    """function(*arguments); with `recompute` its activations are computed again in the backward."""
    if recompute:  # no random numbers are drawn inside
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)
