"""Gated DeltaNet (arXiv 2412.06464): linear attention whose state forgets, and corrects what it wrote.

Per value head, with a state S [K,V] that starts at zero in every document:
    S_t = a_t S_(t-1);  S_t += k_t (b_t (v_t - k_t^T S_t))^T;  y_t = q_t^T S_t
`recurrent_delta_rule` is this, token by token, and the oracle. `chunked_delta_rule` computes it in chunks of
tokens by matrix products (section 3.3). On CUDA flash-linear-attention takes over where it is installed.
"""
# B rows, S tokens per row, T = B*S tokens, D documents, H hidden
# G key heads, N value heads, K and V their dims, F = 2GK + NV features of the convolution
# W width of the convolution, C tokens per chunk, M chunks

from functools import cache as once
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.attention import Cache, Documents
from moe.config import ModelConfig

CHUNK = 64


class GatedDeltaNet(nn.Module):
    """The sequence mixer `linear_attention` of Qwen3-Next: convolution, gated delta rule, gated norm."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.key_heads, self.value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        hidden, ratio = config.hidden_size, self.value_heads // self.key_heads
        # of one key head: query, key, and `ratio` values and gates; `ratio` betas and decays
        self.qkvz_sizes = [self.key_dim, self.key_dim, ratio * self.value_dim, ratio * self.value_dim]
        self.ba_sizes = [ratio, ratio]
        self.in_proj_qkvz = nn.Linear(hidden, self.key_heads * sum(self.qkvz_sizes), bias=False)
        self.in_proj_ba = nn.Linear(hidden, self.key_heads * sum(self.ba_sizes), bias=False)
        self.conv1d = CausalConvolution(
            self.key_heads * sum(self.qkvz_sizes[:3]), config.linear_conv_kernel_dim
        )
        self.A_log = nn.Parameter(torch.empty(self.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads))
        self.norm = GatedRMSNorm(self.value_dim, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(self.value_heads * self.value_dim, hidden, bias=False)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        documents: Documents,
        cache: Cache | None = None,
    ) -> Tensor:
        """hidden [B, S, H] -> [B, S, H]; positions are in the order, `rotary` is not used.

        With a cache every row goes on with its one sequence.
        """
        x = hidden.flatten(0, 1)
        query, key, value, gate = _of_heads(self.in_proj_qkvz(x), self.key_heads, self.qkvz_sizes)
        beta, decay = _of_heads(self.in_proj_ba(x), self.key_heads, self.ba_sizes)  # [T, N]
        log_decay = -self.A_log.float().exp() * F.softplus(decay.float() + self.dt_bias.float())
        seen, state = (cache and cache.layers.get(self.layer)) or (None, None)

        features, seen = self.conv1d(torch.cat((query, key, value), dim=-1), documents, seen)
        keys = self.key_heads * self.key_dim
        query, key, value = features.split((keys, keys, features.shape[1] - 2 * keys), dim=-1)
        ratio = self.value_heads // self.key_heads
        query, key = (
            _unit(x.unflatten(-1, (-1, self.key_dim))).repeat_interleave(ratio, dim=1) for x in (query, key)
        )  # [T, N, K]
        value = value.unflatten(-1, (-1, self.value_dim))  # [T, N, V]

        rule: Any = chunked_delta_rule
        half = hidden.dtype in (torch.bfloat16, torch.float16)
        if hidden.is_cuda and half and (fused := _flash_linear_attention()):
            rule = fused
        elif documents.max_length == 1:
            rule = recurrent_delta_rule
        mixed, state = rule(query, key, value, log_decay, beta.sigmoid(), documents, state)
        if cache is not None:
            cache.layers[self.layer] = seen, state
        mixed = self.norm(mixed.to(hidden.dtype), gate.unflatten(-1, (-1, self.value_dim)))
        return self.out_proj(mixed.flatten(1)).view_as(hidden)


class CausalConvolution(nn.Module):
    """silu of a causal convolution of width W over each feature, inside documents.

    The weight [F, 1, W] is uninitialised, shaped as torch's Conv1d has it.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, 1, width))

    def forward(self, x: Tensor, documents: Documents, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """[T, F] -> [T, F] and the last W - 1 inputs of each document [D, W-1, F].

        `seen`: what this returned for the tokens before, of the same documents.
        """
        lead, count = self.weight.shape[2] - 1, len(documents.lengths)  # inputs before each document
        borders = documents.cu_seqlens.long() + lead * torch.arange(count + 1, device=x.device)  # [D+1]
        leads = borders[:-1, None] + torch.arange(lead, device=x.device)  # [D, W-1]
        padded = x.new_zeros(len(x) + lead * count, x.shape[1])
        if seen is not None:
            padded = padded.index_copy(0, leads.flatten(), seen.flatten(0, 1))
        place = torch.arange(len(x), device=x.device) + lead * documents.number  # of the first input
        padded = padded.index_copy(0, place + lead, x)
        mixed = F.conv1d(padded.t().unsqueeze(0), self.weight, groups=len(self.weight))[0].t()
        last = leads + (borders[1:] - borders[:-1] - lead).unsqueeze(1)
        return F.silu(mixed.index_select(0, place)), padded[last]


class GatedRMSNorm(nn.RMSNorm):
    """x / rms(x) * weight * silu(gate) in fp32: [T, N, V] and its gate -> [T, N, V] of the dtype of x."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        normed = F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)
        return (normed * F.silu(gate.float())).to(x.dtype)


def recurrent_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    documents: Documents,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """query, key [T, N, K], value [T, N, V], log_decay (at most 0) and beta [T, N] -> [T, N, V], last states.

    state [D, N, K, V]: where each document goes on; None = zeros. At least fp32.
    """
    query, key, value, log_decay, beta, state = _prepared(
        query, key, value, log_decay, beta, documents, state
    )
    outputs, lasts, start = [], [], 0
    for length, s in zip(documents.lengths, state, strict=True):  # s [N, K, V]
        for t in range(start, start + length):
            s = s * log_decay[t, :, None, None].exp()
            correction = beta[t, :, None] * (value[t] - (s * key[t, :, :, None]).sum(1))  # [N, V]
            s = s + key[t, :, :, None] * correction[:, None]
            outputs.append((s * query[t, :, :, None]).sum(1))
        lasts.append(s)
        start += length
    return torch.stack(outputs), torch.stack(lasts)


def chunked_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    documents: Documents,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same as `recurrent_delta_rule`, in chunks of which none holds tokens of two documents.

    Inside all chunks at once, then from chunk to chunk, through all documents side by side. Memory is linear
    in T: a state per chunk.
    """
    query, key, value, log_decay, beta, state = _prepared(
        query, key, value, log_decay, beta, documents, state
    )
    chunks = _chunks(documents)
    q, k, v = (chunks.fill(x).transpose(1, 2) for x in (query, key, value))  # [M, N, C, K or V]
    b, g = (chunks.fill(x).transpose(1, 2) for x in (beta, log_decay))  # [M, N, C]
    g = g.double().cumsum(-1)  # up to hundreds: differences of fp32 sums would lose the digits
    # decay from token j to token i of the chunk, 0 above the diagonal, where exp could overflow
    upper = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    decay = (g.unsqueeze(-1) - g.unsqueeze(-2)).masked_fill(upper, -torch.inf)
    decay, from_start = (
        decay.to(q.dtype).exp(),
        g.exp().to(q.dtype).unsqueeze(-1),
    )  # [M, N, C, C], [M, N, C, 1]
    to_end = (g[..., -1:] - g).exp().to(q.dtype).unsqueeze(-1)
    # The corrections of a chunk depend on each other: (1 + A) x = right side, A strictly below the diagonal.
    k_beta = k * b.unsqueeze(-1)
    right = torch.cat((v * b.unsqueeze(-1), k_beta * from_start), dim=-1)
    solved = torch.linalg.solve_triangular(k_beta @ k.mT * decay, right, upper=False, unitriangular=True)
    written, read = solved.split((v.shape[-1], k.shape[-1]), dim=-1)  # [M, N, C, V], [M, N, C, K]
    inside = q @ k.mT * decay  # [M, N, C, C]
    q, k, chunk_decay = q * from_start, k * to_end, from_start[..., -1:, :]

    outputs, lasts, active = [], [], state[chunks.by_length]
    for start, count in chunks.steps:
        part = slice(start, start + count)
        lasts.append(active[count:])  # of the documents that have ended
        active = active[:count]
        new = written[part] - read[part] @ active
        outputs.append(q[part] @ active + inside[part] @ new)
        active = active * chunk_decay[part] + k[part].mT @ new
    lasts.append(active)
    last = torch.cat(lasts[::-1])[chunks.by_length.argsort()]
    return chunks.take(torch.cat(outputs).transpose(1, 2)), last


class Chunks:
    """Where the tokens of each document lie in chunks of their own: chunk by chunk, long documents first."""

    def __init__(self, documents: Documents) -> None:
        device = documents.cu_seqlens.device
        counts = (torch.tensor(documents.lengths) + CHUNK - 1) // CHUNK  # chunks of each document
        by_length = counts.argsort(descending=True, stable=True)
        active = [int((counts > step).sum()) for step in range(int(counts.max()))]
        starts = [sum(active[:step]) for step in range(len(active))]
        # first chunk and number of chunks of each step through the documents
        self.steps = list(zip(starts, active, strict=True))
        self.size = sum(active) * CHUNK
        self.by_length = by_length.to(device)  # [D]
        number = documents.number
        position = torch.arange(len(number), device=device) - documents.cu_seqlens[number]  # in the document
        chunk = torch.tensor(starts, device=device)[position // CHUNK] + self.by_length.argsort()[number]
        self.place = chunk * CHUNK + position % CHUNK  # [T]

    def fill(self, x: Tensor) -> Tensor:
        """[T, ...] -> [M, C, ...], zeros where a chunk has no token."""
        empty = x.new_zeros(self.size, *x.shape[1:])
        return empty.index_copy(0, self.place, x).unflatten(0, (-1, CHUNK))

    def take(self, x: Tensor) -> Tensor:
        """[M, C, ...] -> [T, ...], the inverse of `fill`."""
        return x.flatten(0, 1).index_select(0, self.place)


@lru_cache(maxsize=1)  # the layers of a forward share it
def _chunks(documents: Documents) -> Chunks:
    return Chunks(documents)


def _prepared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    documents: Documents,
    state: Tensor | None,
) -> tuple[Tensor, ...]:
    """All in at least fp32, the query scaled, the state there."""
    precise = torch.promote_types(query.dtype, torch.float32)
    if state is None:
        state = value.new_zeros(len(documents.lengths), *key.shape[1:], value.shape[-1])
    query = query.to(precise) * key.shape[-1] ** -0.5
    return query, *(x.to(precise) for x in (key, value, log_decay, beta, state))


@once
def _flash_linear_attention() -> Any:
    """The rule by the kernel of flash-linear-attention; None where that is not installed."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None

    def rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        documents: Documents,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        query, key = query.to(value.dtype), key.to(value.dtype)  # the kernel takes 16 bits
        mixed, last = chunk_gated_delta_rule(
            *(x.unsqueeze(0) for x in (query, key, value, log_decay, beta)),
            initial_state=state,
            output_final_state=True,
            cu_seqlens=documents.cu_seqlens.long(),
        )
        return mixed[0], last

    return rule


def _of_heads(projected: Tensor, heads: int, sizes: list[int]) -> tuple[Tensor, ...]:
    """[T, heads * sum(sizes)], each head with all its parts -> each part of all heads [T, heads * size]."""
    parts = projected.unflatten(-1, (heads, -1)).split(sizes, dim=-1)
    return tuple(part.flatten(1) for part in parts)


def _unit(x: Tensor) -> Tensor:
    """x of length 1 in its last dimension, in at least fp32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
