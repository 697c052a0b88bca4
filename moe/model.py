"""The language model, dense or sparse: arithmetic on one rank. Modules have the names of Hugging Face."""
# B rows, S tokens per row, T = B*S tokens, D documents, H hidden, V vocabulary, L sparse layers

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.attention import Attention
from moe.block import MoEBlock
from moe.cache import CacheStep
from moe.config import ConfigError, ModelConfig
from moe.cross_entropy import IGNORED, chunked_cross_entropy, token_log_probs
from moe.distillation import Lesson, Teaching, chunked_distillation, teach
from moe.documents import Documents
from moe.formats import FULL, LINEAR
from moe.gated_delta_net import GatedDeltaNet
from moe.inputs import LayerInputs
from moe.mlp import MLP
from moe.norm import rms_norm
from moe.recompute import RECOMPUTE, call
from moe.rope import rotary_tables
from moe.router import RouterStatistics, RoutingInputs, SampledExperts, TrainingRouting, stack_statistics
from moe.scores import label_scores


class ModelOutput(NamedTuple):
    """The results of one forward; the modules keep no state."""

    logits: Tensor | None = None  # [B, S, V], with a cache [D, V], without labels
    cross_entropy_sum: Tensor | None = None  # scalar fp32, sum over labels != -100
    router: RouterStatistics | None = None  # stacked over the L sparse layers; None for a dense model
    mtp_cross_entropy_sum: Tensor | None = None  # the same for the token after next, if it is trained
    log_probs: Tensor | None = None  # [B, S] or [N] fp32 of the labels; 0 = no label
    entropies: Tensor | None = None  # [B, S] fp32 of the distributions over the vocabulary, no gradient
    best: Tensor | None = None  # [N] bool: no token is more probable than the label
    distillation_sum: Tensor | None = None  # scalar fp32: the loss with the gradient
    divergence_sum: Tensor | None = None  # scalar fp32 without gradient: from the teacher
    taught: tuple[Tensor, Tensor] | None = None  # `ids` and `log_probs` of a `Lesson`


# What the head computes. None: logits, or with labels [B, S] the summed cross entropy. With labels, a
# temperature: their log-probabilities in softmax(logits / temperature) and the entropies; a lesson: the sums
# of `chunked_distillation`; places [N] of the T tokens, labels [N]: log-probabilities there, no gradient.
# Without labels, a Teaching: what a student's next lesson holds.
How = float | Lesson | Teaching | Tensor | None


# for each kind of sequence mixer: the name of its module in a layer, and its class
MIXERS: dict[str, tuple[str, type[Attention] | type[GatedDeltaNet]]] = {
    FULL: ("self_attn", Attention),
    LINEAR: ("linear_attn", GatedDeltaNet),
}


class DecoderLayer(nn.Module):
    """Sequence mixer and feed-forward, each with a norm before it and a residual connection around it."""

    def __init__(self, config: ModelConfig, layer: int, backend: str, recompute: str) -> None:
        super().__init__()
        self.layer = layer
        self.sparse_layer = sum(sparse < layer for sparse in config.moe_layers)  # its row in [L, ...]
        self.recompute = recompute
        self.input_layernorm = rms_norm(config, config.hidden_size)
        self.mixer, mixer_class = MIXERS[config.layer_type(layer)]
        self.add_module(self.mixer, mixer_class(config, layer))
        self.post_attention_layernorm = rms_norm(config, config.hidden_size)
        self.mlp: MoEBlock | MLP
        if config.is_moe_layer(layer):
            self.mlp = MoEBlock(config, backend, recompute)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: Tensor, inputs: LayerInputs) -> tuple[Tensor, RouterStatistics | None]:
        """hidden [B, S, H] -> [B, S, H] and, from a sparse layer, its router statistics."""
        hidden, normed = call(self._mix, hidden, inputs, recompute=self.recompute == "local")
        if isinstance(self.mlp, MoEBlock):
            update, statistics = self.mlp(normed, inputs.routing.of_layer(self.layer, self.sparse_layer))
            return hidden + update, statistics
        return hidden + call(self.mlp, normed, recompute=self.recompute in ("experts", "local")), None

    def _mix(self, hidden: Tensor, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
        """The hidden states [B, S, H] after the sequence mixer, and the normed input of the feed-forward."""
        hidden = hidden + getattr(self, self.mixer)(self.input_layernorm(hidden), inputs)
        return hidden, self.post_attention_layernorm(hidden)


class Decoder(nn.Module):
    """Token embedding, decoder layers and the final norm."""

    def __init__(self, config: ModelConfig, backend: str, recompute: str) -> None:
        super().__init__()
        self.recompute_layers = recompute == "full"
        drawn = torch.randn(config.vocab_size, config.hidden_size)  # nn.Embedding's way imports a compiler
        self.embed_tokens = nn.Embedding.from_pretrained(drawn, freeze=False)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, backend, recompute) for layer in range(config.num_hidden_layers)
        )
        self.norm = rms_norm(config, config.hidden_size)

    def forward(self, hidden: Tensor, inputs: LayerInputs) -> tuple[Tensor, list[RouterStatistics]]:
        """Embedded tokens [B, S, H] -> hidden states after the final norm [B, S, H], router statistics."""
        per_layer: list[RouterStatistics] = []
        for layer in self.layers:
            hidden, statistics = call(layer, hidden, inputs, recompute=self.recompute_layers)
            if statistics is not None:
                per_layer.append(statistics)
        return self.norm(hidden), per_layer


class MultiTokenPrediction(nn.Module):
    """One more decoder layer, with full attention, that predicts the token after next.

    Its input is a token's hidden state, after the model's final norm, and the embedding of the next token. It
    shares the embedding and the head of the model (arXiv 2412.19437, section 2.2). Modules have the names and
    the order of the released Qwen3-Next folders.
    """

    def __init__(self, config: ModelConfig, backend: str, recompute: str) -> None:
        super().__init__()
        size = config.hidden_size
        self.recompute_layers = recompute == "full"
        self.pre_fc_norm_embedding = rms_norm(config, size)
        self.pre_fc_norm_hidden = rms_norm(config, size)
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layers = nn.ModuleList([DecoderLayer(config, config.num_hidden_layers, backend, recompute)])
        self.norm = rms_norm(config, size)

    def forward(
        self, hidden: Tensor, embedding: Tensor, inputs: LayerInputs
    ) -> tuple[Tensor, list[RouterStatistics]]:
        """hidden, embedding of next tokens [B, S, H] -> input of the head [B, S, H], router statistics."""
        both = torch.cat((self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden)), dim=-1)
        hidden, statistics = call(self.layers[0], self.fc(both), inputs, recompute=self.recompute_layers)
        return self.norm(hidden), [] if statistics is None else [statistics]


def _next(values: Tensor, documents: Documents, reach: int, otherwise: Tensor | int) -> Tensor:
    """values [B, S] of the next token; `otherwise` where the token `reach` later is in another document."""
    number = documents.number  # [T]
    same = number[reach:] == number[:-reach]
    same = F.pad(same, (0, len(number) - len(same))).view_as(values)
    return torch.where(same, values.flatten().roll(-1).view_as(values), otherwise)


class LanguageModelHead(nn.Linear):
    """hidden [B, S, H] -> fields of `ModelOutput`, chosen by labels and `How`.

    The loss is computed here because ZeRO-3 gathers only the parameters of the module that is called.
    """

    def forward(self, hidden: Tensor, labels: Tensor | None = None, how: How = None) -> Any:
        if isinstance(how, Teaching):
            return {"taught": teach(hidden.flatten(0, 1), self.weight, *how)}
        if labels is None:
            return {"logits": F.linear(hidden, self.weight)}
        states, targets = hidden.flatten(0, 1), labels.flatten()
        if how is None:
            return {"cross_entropy_sum": chunked_cross_entropy(states, self.weight, targets)}
        if isinstance(how, Lesson):
            loss, cross_entropy, divergence = chunked_distillation(states, self.weight, targets, how)
            sums = {"distillation_sum": loss, "divergence_sum": divergence}
            return {"cross_entropy_sum": cross_entropy, **sums}
        if isinstance(how, Tensor):
            log_probs, best = label_scores(states[how], self.weight, targets)
            return {"log_probs": log_probs, "best": best}
        log_probs, entropies = token_log_probs(states, self.weight, targets, how)
        return {"log_probs": log_probs.view_as(labels), "entropies": entropies.view_as(labels)}


class CausalLM(nn.Module):
    """The language model. `backend` computes the experts; `recompute` says what the backward computes again.

    recompute: "none"; "experts" = the inside of every feed-forward, from the tokens that reached its experts;
    "local" = also sequence mixers, norms and routers, so that no token travels again; "full" = every layer.
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
        ahead = config.num_nextn_predict_layers
        self.mtp = MultiTokenPrediction(config, backend, recompute) if ahead else None
        self._tie()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        token_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: CacheStep | None = None,
        selection_bias: Tensor | None = None,
        routing_only: bool = False,
        routing: TrainingRouting | None = None,
        lengths: Sequence[int] | None = None,
        how: How = None,
        sampled: SampledExperts | None = None,
        keep_experts: bool = False,
    ) -> ModelOutput:
        """Logits, or with labels the summed cross entropy, or what `how` asks; and the router statistics.

        In training mode, a model with multi-token prediction also returns its loss; its router comes last.

        input_ids, position_ids [B, S] int64; cu_seqlens [D+1] int32, borders of the documents over T tokens.
        token_mask [B, S] bool: False keeps a token (padding) out of the router statistics.
        labels [B, S] int64, already shifted, -100 = no loss.
        cache: of `Cache.prefill` or `Cache.decode`: the logits are those after each document's last token.
        selection_bias [L, E] fp32: added to the routers' scores for the choice of experts only.
        routing_only: return only the router statistics; the head does not run.
        routing: settings of routing that apply in training only.
        lengths: the lengths of the documents, on the host; None reads cu_seqlens, which waits for its device.
        how: what the head computes, see `How`. Nothing looks ahead unless it is a loss of all labels.
        sampled: the experts that sampling chose, for training. keep_experts: the statistics hold the experts.
        Ids must lie in the vocabulary: nothing checks them here.
        """
        documents, hidden = Documents(cu_seqlens, lengths), self.model.embed_tokens(input_ids)
        rotary = rotary_tables(position_ids.flatten(), self.config, hidden.dtype)
        routings = RoutingInputs(token_mask, selection_bias, routing, sampled, keep_experts)
        inputs = LayerInputs(rotary, documents, cache, routings)
        hidden, statistics = self.model(hidden, inputs)
        ahead, loss_ahead = None, None
        of_labels = how is None or isinstance(how, Lesson)
        if self.mtp is not None and self.training and cache is None and of_labels:
            embedding = self.model.embed_tokens(_next(input_ids, documents, 1, input_ids))
            ahead, more = self.mtp(hidden, embedding, inputs)
            statistics = statistics + more
        router = stack_statistics(statistics) if statistics else None
        if routing_only:
            return ModelOutput(router=router)
        if cache is not None:
            hidden = hidden.flatten(0, 1)[documents.borders[1:] - 1]  # [D, H]
        if ahead is not None and labels is not None:
            loss_ahead = self.lm_head(ahead, _next(labels, documents, 2, IGNORED))["cross_entropy_sum"]
        found = self.lm_head(hidden, labels, how)
        return ModelOutput(router=router, mtp_cross_entropy_sum=loss_ahead, **found)

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # Leaving the meta device replaces every parameter, so the two tied weights must be tied again.
        super()._apply(fn, recurse)
        self._tie()
        return self
