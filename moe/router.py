"""The router: which experts a token goes to, with which weights, and the statistics for balance."""

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moe.kernels.support import run_on

# T tokens, H hidden, E experts, K experts per token, L mixture-of-experts layers


class RouterStatistics(NamedTuple):
    """Sums over the tokens of one micro-batch on one rank, without padding; for one layer, or L stacked.

    They are returned, not kept in a module, so that the second forward of recompute counts nothing twice.
    """

    tokens_per_expert: Tensor  # [E] or [L,E] fp32, how often each expert was selected; no gradient
    probability_sums: Tensor  # [E] or [L,E] fp32, softmax over all experts; gradient flows
    z_sums: Tensor  # [] or [L] fp32, logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906); gradient flows
    entropy_sums: Tensor  # [] or [L] fp32, entropy of the softmax in nats; no gradient
    logit_range: Tensor  # [] or [L] fp32, the largest max - min of the logits of any token; no gradient
    mismatches: Tensor | None = None  # [] or [L] fp32, tokens that differ from their `SampledExperts`
    expert_indices: Tensor | None = None  # [T,K] or [L,T,K], not a sum: the experts used, if `keep_experts`

    def present(self) -> list[Tensor]:
        """The fields that are there, in their order."""
        return [value for value in self if value is not None]


class TrainingRouting(NamedTuple):
    """Settings of routing that apply in training only; evaluation and generation pass None instead."""

    jitter_noise: float  # the router's input times U(1 - noise, 1 + noise) (Switch, arXiv 2101.03961)
    capacity_factor: float | None  # see `within_capacity`; None is dropless
    keys: list[str]  # [B] the noise of each row is a function of its key and the layer


@dataclass(frozen=True)
class SampledExperts:
    """The experts that a token went to when a model sampled it. A dataclass, as `moe.inputs.LayerInputs` is.

    With `replay` the token goes to them again (R3, arXiv 2510.11370), with the weights that the router gives
    them now; without, they are only compared with the router's choice.
    """

    experts: Tensor  # [T,L,K] or, for one layer, [T,K] signed integers; all -1 where no choice is known
    replay: bool

    def of_layer(self, sparse_layer: int) -> "SampledExperts":
        """Those of one layer. The layer of multi-token prediction, which samples nothing, has none."""
        if sparse_layer == self.experts.shape[1]:
            return replace(self, experts=torch.full_like(self.experts[:, 0], -1))
        return replace(self, experts=self.experts[:, sparse_layer])


@dataclass(frozen=True)
class RoutingInputs:
    """Inputs of routing besides the hidden states: for a whole forward or, from `of_layer`, for one layer."""

    token_mask: Tensor | None = None  # [B,S] bool; False (padding) keeps a token out of the statistics
    selection_bias: Tensor | None = None  # [L,E] or [E] fp32: added to the scores that choose experts
    training: TrainingRouting | None = None
    sampled: SampledExperts | None = None
    keep_experts: bool = False  # the statistics hold the experts of each token

    def of_layer(self, layer: int, sparse_layer: int) -> "RoutingInputs":
        """The inputs for decoder layer `layer`, which has index `sparse_layer` among the L sparse layers."""
        bias, training = self.selection_bias, self.training
        if training is not None:
            training = training._replace(keys=[f"{key}:{layer}" for key in training.keys])
        sampled = None if self.sampled is None else self.sampled.of_layer(sparse_layer)
        bias = None if bias is None else bias[sparse_layer]
        return replace(self, selection_bias=bias, training=training, sampled=sampled)


PLAIN = RoutingInputs()  # no padding, no selection bias, no training settings


def stack_statistics(layers: list[RouterStatistics]) -> RouterStatistics:
    """Statistics of L layers with a leading dimension L."""
    fields: Any = zip(*layers, strict=True)  # all layers have an optional field, or none
    stacked: Any = [None if values[0] is None else torch.stack(values) for values in fields]
    return RouterStatistics(*stacked)


class Router(nn.Module):
    """Softmax over all experts, then top-k, then (`norm_topk_prob`) weights that sum to 1; all in fp32.

    `weight` [E,H] is uninitialised; `moe.init` or `moe.hf` fills it.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, num_experts_per_tok: int, norm_topk_prob: bool
    ) -> None:
        super().__init__()
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(
        self,
        hidden: Tensor,
        token_mask: Tensor | None = None,
        selection_bias: Tensor | None = None,
        sampled: SampledExperts | None = None,
    ) -> tuple[Tensor, Tensor, RouterStatistics]:
        """hidden [T,H], token_mask [T] bool (None: all count) -> routing_weights [T,K], expert_indices [T,K].

        `selection_bias` [E] fp32 changes the choice of experts, but not their weights. The weights have the
        dtype of `hidden`. `sampled` [T,K] counts mismatches, and may take the place of the choice.
        """
        logits = _Float32Linear.apply(hidden, self.weight)  # [T,E] fp32
        settings = (self.num_experts_per_tok, self.norm_topk_prob, hidden.dtype)
        given = (logits, selection_bias, token_mask, *settings)
        if sampled is None and run_on(logits):
            from moe.kernels.router import route

            routing_weights, expert_indices, *sums = route(*given)
        else:
            routing_weights, expert_indices, *sums = _route(*given, sampled)
        return routing_weights, expert_indices, RouterStatistics(*sums)


def _route(
    logits: Tensor,
    selection_bias: Tensor | None,
    token_mask: Tensor | None,
    top_k: int,
    normalize: bool,
    dtype: torch.dtype,
    sampled: SampledExperts | None = None,
) -> tuple[Tensor, ...]:
    """logits [T,E] fp32 -> weights [T,K] in `dtype`, indices [T,K], and sums of RouterStatistics."""
    probabilities = logits.softmax(-1)
    counted = []
    if selection_bias is None and sampled is None:
        routing_weights, expert_indices = probabilities.topk(top_k, dim=-1)
    else:
        scores = probabilities if selection_bias is None else probabilities + selection_bias
        expert_indices = scores.topk(top_k, dim=-1).indices
        if sampled is not None:
            expert_indices, mismatches = _compare(expert_indices, sampled, token_mask)
            counted = [mismatches]
        routing_weights = probabilities.gather(-1, expert_indices)
    if normalize:
        routing_weights = routing_weights / routing_weights.sum(-1, keepdim=True)
    sums = _statistics(logits, probabilities, expert_indices, token_mask)
    return routing_weights.to(dtype), expert_indices, *sums, *counted


def _compare(
    expert_indices: Tensor, sampled: SampledExperts, token_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The experts [T,K] to use, and how many tokens of the mask have other ones than `sampled`."""
    experts = sampled.experts.to(expert_indices.dtype)
    known = experts[:, 0] >= 0  # [T]
    if sampled.replay:
        expert_indices = torch.where(known.unsqueeze(1), experts, expert_indices)
    differs = known & (expert_indices.sort(-1).values != experts.sort(-1).values).any(-1)
    if token_mask is not None:
        differs = differs & token_mask
    return expert_indices, differs.sum(dtype=torch.float32)


def seeded(key: str, device: torch.device) -> torch.Generator:
    """A generator whose numbers are a function of `key` and the kind of device."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest))


def jittered(hidden: Tensor, noise: float, keys: list[str]) -> Tensor:
    """hidden [B,S,H] times U(1 - noise, 1 + noise), drawn for each row from its key: [B,S,H].

    Recompute, a counting forward, a resumed run and a different layout of ranks thus draw the same noise.
    """
    factors = torch.empty_like(hidden, dtype=torch.float32)
    for row, key in zip(factors.unbind(), keys, strict=True):
        row.uniform_(1 - noise, 1 + noise, generator=seeded(key, hidden.device))
    return (hidden * factors).to(hidden.dtype)


def within_capacity(
    routing_weights: Tensor,
    expert_indices: Tensor,
    num_experts: int,
    capacity_factor: float,
    token_mask: Tensor | None = None,
) -> Tensor:
    """expert_indices [T,K] with the id `num_experts` in every slot beyond its expert's capacity: [T,K].

    An expert takes at most ceil(capacity_factor * T * K / E) slots of this micro-batch on this rank: those of
    the largest routing weights [T,K] (the earlier slot if two are equal), padding last (the policy "probs" of
    Megatron-LM and DeepSpeed).
    """
    capacity = math.ceil(capacity_factor * expert_indices.numel() / num_experts)
    priority = routing_weights.detach()
    if token_mask is not None:
        priority = priority.masked_fill(~token_mask.unsqueeze(1), -1.0)
    slots = priority.flatten().argsort(descending=True, stable=True)  # [T*K]
    slots = slots[expert_indices.flatten()[slots].argsort(stable=True)]  # by expert, then by priority
    experts = expert_indices.flatten()[slots]
    starts = torch.searchsorted(experts, torch.arange(num_experts, device=experts.device))  # [E]
    place = torch.arange(len(slots), device=experts.device) - starts[experts]
    kept = torch.empty_like(experts)
    kept[slots] = torch.where(place < capacity, experts, num_experts)
    return kept.view_as(expert_indices)


def _statistics(
    logits: Tensor, probabilities: Tensor, expert_indices: Tensor, token_mask: Tensor | None
) -> tuple[Tensor, ...]:
    """The sums of RouterStatistics that every forward has, in their order."""
    counts = torch.ones_like(logits[:, 0]) if token_mask is None else token_mask.to(logits.dtype)  # [T]
    tokens_per_expert = logits.new_zeros(logits.shape[1])
    counts_of_slots = counts.unsqueeze(1).expand_as(expert_indices).flatten()
    tokens_per_expert.scatter_add_(0, expert_indices.flatten(), counts_of_slots)
    log_partition = logits.logsumexp(-1)  # [T]
    with torch.no_grad():
        entropy = log_partition - (probabilities * logits).sum(-1)
        low, high = logits.aminmax(dim=-1)  # [T]
        logit_range = F.pad((high - low) * counts, (0, 1)).max()  # 0 without tokens
    return (
        tokens_per_expert,
        (probabilities * counts.unsqueeze(1)).sum(0),
        (log_partition.square() * counts).sum(),
        (entropy * counts).sum(),
        logit_range,
    )


class _Float32Linear(Function):
    """x @ weight^T in fp32 that saves its operands uncast: an fp32 copy of x takes 4H bytes per token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if x.is_cuda and x.dtype == weight.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(x, weight.T, out_dtype=torch.float32)  # tensor cores: products exact, sums fp32
        return F.linear(x.float(), weight.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return (grad @ weight.float()).to(x.dtype), (grad.t() @ x.float()).to(weight.dtype)
