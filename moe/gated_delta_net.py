"""Gated DeltaNet (arXiv 2412.06464): linear attention whose state decays and is updated by the delta rule.

Per value head, with a state S [K,V] that starts at zero in every document:
    S_t = a_t S_(t-1);  S_t += k_t (b_t (v_t - k_t^T S_t))^T;  y_t = q_t^T S_t
`recurrent_delta_rule` computes this token by token and is the oracle. `chunked_delta_rule` computes it in
chunks of tokens by matrix products (section 3.3). On CUDA, flash-linear-attention is used if it is installed
and gives the same results in a test (`kernel_obstacle`).
"""
# B rows, S tokens per row, T = B*S tokens, D documents, H hidden
# G key heads, N value heads, K and V their dims, F = 2GK + NV features of the convolution
# W width of the convolution, C tokens per chunk, M chunks

from collections import Counter
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import accumulate, islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.documents import Documents
from moe.inputs import LayerInputs
from moe.norm import precise

CHUNK = 64
HAS_KERNEL = find_spec("fla") is not None


class GatedDeltaNet(nn.Module):
    """The sequence mixer `linear_attention` of Qwen3-Next: convolution, gated delta rule, gated norm."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.key_heads, self.value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.state_shape = (self.value_heads, key_dim, value_dim)
        self.lead = config.linear_conv_kernel_dim - 1  # earlier inputs that the convolution of a token reads
        hidden, per_key = config.hidden_size, self.value_heads // self.key_heads
        # for one key head: query, key, and the values and gates of its value heads; their betas and decays
        self.qkvz_sizes = [key_dim, key_dim, per_key * value_dim, per_key * value_dim]
        self.ba_sizes = [per_key, per_key]
        self.in_proj_qkvz = nn.Linear(hidden, self.key_heads * sum(self.qkvz_sizes), bias=False)
        self.in_proj_ba = nn.Linear(hidden, self.key_heads * sum(self.ba_sizes), bias=False)
        self.conv1d = CausalConvolution(self.key_heads * sum(self.qkvz_sizes[:3]), self.lead + 1)
        self.A_log = nn.Parameter(torch.empty(self.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads))
        self.norm = GatedRMSNorm(value_dim, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(self.value_heads * value_dim, hidden, bias=False)

    def forward(self, hidden: Tensor, inputs: LayerInputs) -> Tensor:
        """hidden [B, S, H] -> [B, S, H], no rotary tables."""
        documents, cache = inputs.documents, inputs.cache
        x = hidden.flatten(0, 1)
        query, key, value, gate = _of_heads(self.in_proj_qkvz(x), self.key_heads, self.qkvz_sizes)
        beta, decay = _of_heads(self.in_proj_ba(x), self.key_heads, self.ba_sizes)  # [T, N]
        log_decay = -precise(self.A_log).exp() * F.softplus(precise(decay) + self.dt_bias)
        features = torch.cat((query, key, value), dim=-1)
        seen, state = None, log_decay.new_zeros(len(documents.lengths), *self.state_shape)
        if cache is not None:
            nothing = (
                features.new_zeros(1, self.lead, features.shape[1]),
                state.new_zeros(1, *self.state_shape),
            )
            seen, state = cache.states(self.layer, nothing)
        decodes = cache is not None and cache.visible is not None
        convolved = self.conv1d(features, documents, seen if decodes else None)
        query, key, value = convolved.split((query.shape[1], key.shape[1], value.shape[1]), dim=-1)
        per_key = self.value_heads // self.key_heads
        query, key = (_unit(x.unflatten(-1, (self.key_heads, -1))) for x in (query, key))
        query, key = (x.repeat_interleave(per_key, dim=1) for x in (query, key))  # [T, N, K]
        value = value.unflatten(-1, (self.value_heads, -1))  # [T, N, V]
        delta = DeltaInputs(query, key, value, log_decay, beta.sigmoid())
        if decodes:
            mixed, last = delta_step(delta, state)
        else:
            fused = kernel_obstacle(hidden.device, hidden.dtype, *self.state_shape[1:]) is None
            mixed, last = (fused_delta_rule if fused else chunked_delta_rule)(delta, documents, state)
        if seen is not None:
            seen.copy_(last_inputs(features, documents, seen))
            state.copy_(last)
        mixed = self.norm(mixed.to(hidden.dtype), gate.unflatten(-1, (self.value_heads, -1)))
        return self.out_proj(mixed.flatten(1)).view_as(hidden)


class CausalConvolution(nn.Module):
    """silu of a causal convolution of width W over each feature; `weight` has the shape of torch's Conv1d."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, 1, width))

    def forward(self, x: Tensor, documents: Documents, seen: Tensor | None) -> Tensor:
        """[T, F] -> [T, F], inside documents. `seen` [T, W-1, F]: the cached inputs before each token."""
        taps = self.weight[:, 0].t()  # [W, F], the last one on the token itself
        if seen is None:
            position, lags = documents.position.unsqueeze(1), range(len(taps) - 1, -1, -1)
            earlier = [torch.where(position >= lag, x.roll(lag, dims=0), 0) for lag in lags]  # [T, F]
        else:
            earlier = [*seen.unbind(1), x]
        return F.silu(sum(part * tap for part, tap in zip(earlier, taps, strict=True)))


def last_inputs(x: Tensor, documents: Documents, seen: Tensor) -> Tensor:
    """The last W-1 inputs of each document [D, W-1, F]: of x [T, F], and before its start of `seen`."""
    starts, ends = documents.borders[:-1, None], documents.borders[1:, None]
    place = ends + torch.arange(-seen.shape[1], 0, device=x.device)  # [D, W-1]
    before = (place - starts + seen.shape[1]).clamp(max=seen.shape[1] - 1)
    before = seen.take_along_dim(before.unsqueeze(-1), dim=1)
    return torch.where((place >= starts).unsqueeze(-1), x[place.clamp(min=0)], before)


class GatedRMSNorm(nn.RMSNorm):
    """x / rms(x) * weight * silu(gate): [T, N, V] and its gate -> [T, N, V] of the dtype of x."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        normed = F.rms_norm(precise(x), self.normalized_shape, precise(self.weight), self.eps)
        return (normed * F.silu(precise(gate))).to(x.dtype)


class DeltaInputs(NamedTuple):
    """The inputs of the delta rule for every token."""

    query: Tensor  # [T, N, K]
    key: Tensor  # [T, N, K]
    value: Tensor  # [T, N, V]
    log_decay: Tensor  # [T, N], at most 0
    beta: Tensor  # [T, N]

    def precise(self) -> "DeltaInputs":
        """The inputs in at least fp32, with the query scaled by K^-0.5."""
        x = DeltaInputs(*(precise(part) for part in self))
        return x._replace(query=x.query * x.query.shape[-1] ** -0.5)


def recurrent_delta_rule(x: DeltaInputs, documents: Documents, state: Tensor) -> tuple[Tensor, Tensor]:
    """State before each document [D, N, K, V] -> outputs [T, N, V], state after each document."""
    query, key, value, log_decay, beta = x.precise()
    outputs, lasts, tokens = [], [], iter(range(len(query)))
    for length, s in zip(documents.lengths, state, strict=True):  # s [N, K, V]
        for t in islice(tokens, length):
            s = s * log_decay[t, :, None, None].exp()
            correction = beta[t, :, None] * (value[t] - (s * key[t, :, :, None]).sum(1))  # [N, V]
            s = s + key[t, :, :, None] * correction[:, None]
            outputs.append((s * query[t, :, :, None]).sum(1))
        lasts.append(s)
    return torch.stack(outputs), torch.stack(lasts)


def delta_step(x: DeltaInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `recurrent_delta_rule` for one token in each of T documents; overwrites the state."""
    query, key, value, log_decay, beta = (
        part.unsqueeze(-2) for part in x.precise()
    )  # [T, N, 1, K], [T, 1, N]
    state *= log_decay.mT.exp().unsqueeze(-1)
    correction = beta.mT.unsqueeze(-1) * (value - key @ state)  # [T, N, 1, V]
    state += key.mT * correction
    return (query @ state).squeeze(-2), state


def chunked_delta_rule(x: DeltaInputs, documents: Documents, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `recurrent_delta_rule`, in chunks; no chunk holds tokens of two documents.

    The work inside chunks is done for all chunks at once. Then a loop passes the states from chunk to chunk,
    for all documents in parallel. Memory is linear in T: one state per chunk.
    """
    chunks = _chunks(documents)
    q, k, v, g, b = (chunks.fill(part).transpose(1, 2) for part in x.precise())  # [M, N, C, ...]
    upper = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    # Running sums by a matrix product, because cumsum is not deterministic on CUDA; in fp64, because the sums
    # reach hundreds and their differences would lose precision in fp32.
    g = g.double() @ (~upper.mT).double()
    # decay from token j to token i of the chunk, 0 above the diagonal, where exp could overflow
    decay = (g.unsqueeze(-1) - g.unsqueeze(-2)).masked_fill(upper, -torch.inf)  # [M, N, C, C]
    decay = decay.to(q.dtype).exp()
    from_start, to_end = (log.exp().to(q.dtype).unsqueeze(-1) for log in (g, g[..., -1:] - g))  # [M, N, C, 1]
    # The corrections of a chunk depend on each other: solve (1 + A) x = right, A strictly lower triangular.
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
    last = torch.cat([active, *reversed(lasts)])[chunks.by_length.argsort()]
    return chunks.take(torch.cat(outputs).transpose(1, 2)), last


def fused_delta_rule(x: DeltaInputs, documents: Documents, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `recurrent_delta_rule` by the kernel of flash-linear-attention: CUDA and 16 bits only."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    x = x._replace(query=x.query.to(x.value.dtype), key=x.key.to(x.value.dtype))
    batch = (part.unsqueeze(0) for part in x)
    states = {"initial_state": state, "output_final_state": True}
    mixed, last = chunk_gated_delta_rule(*batch, **states, cu_seqlens=documents.borders)
    return mixed[0], last


def kernel_obstacle(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    """Why `fused_delta_rule` is not used for heads of these dims, and a remedy; None if it is used.

    A kernel that could run is tested once per process: see `_probe`.
    """
    if device.type != "cuda":
        return f"flash-linear-attention has no kernel on {device.type}; use a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-linear-attention is only used in 16 bits, not in {dtype}; use dtype=bf16"
    if torch.are_deterministic_algorithms_enabled():
        return "flash-linear-attention does not guarantee equal bits, as deterministic=true requires"
    if not HAS_KERNEL:
        return "flash-linear-attention is not installed; `pip install flash-linear-attention`"
    return _probe(device, dtype, key_dim, value_dim)


@cache
def _probe(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    """What is wrong with `fused_delta_rule`, forward or backward, on a few tokens; None if nothing is.

    Some Triton versions fail in the backward on some GPUs, or return NaN without an error.
    """
    remedy = "update flash-linear-attention and Triton (3.4.0 to 3.7.0 fail on Hopper)"
    generator = torch.Generator().manual_seed(0)
    documents = Documents(torch.tensor([0, 70, 71, 200], dtype=torch.int32, device=device))

    def draw(*shape: int) -> Tensor:
        return torch.randn(200, 2, *shape, generator=generator).to(device)  # two heads

    def results(rule: Callable[..., tuple[Tensor, Tensor]], kind: torch.dtype) -> list[Tensor]:
        log_decay = x.log_decay.float()
        given = DeltaInputs(*(part.to(kind) for part in x))._replace(log_decay=log_decay)
        given = DeltaInputs(*(part.detach().requires_grad_() for part in given))
        mixed, _ = rule(given, documents, log_decay.new_zeros(3, 2, key_dim, value_dim))
        return [mixed.detach(), *torch.autograd.grad(mixed.float().square().sum(), [*given])]

    try:
        with torch.inference_mode(False), torch.enable_grad():
            query, key = _unit(draw(key_dim)), _unit(draw(key_dim))
            x = DeltaInputs(query, key, draw(value_dim), -draw().abs(), draw().sigmoid())
            x = DeltaInputs(*(part.to(dtype) for part in x))
            fused, chunked = results(fused_delta_rule, dtype), results(chunked_delta_rule, torch.float32)
            differences = [(a.float() - b, b) for a, b in zip(fused, chunked, strict=True)]
            errors = [float(d.abs().max() / b.abs().max()) for d, b in differences]
    except Exception as error:  # whatever the error is, training continues without the kernel
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return f"flash-linear-attention fails here ({said}); {remedy}"
    if all(error <= 2**-5 for error in errors):  # false for NaN
        return None
    shown = ", ".join(f"{error:.1e}" for error in errors)
    return f"flash-linear-attention computes wrong here (relative errors {shown}); {remedy}"


class Chunks:
    """The place of every token in chunks that hold one document each.

    Step n processes the n-th chunk of every document. Chunks are sorted by step, then long documents first.
    """

    def __init__(self, documents: Documents) -> None:
        number, position = documents.number, documents.position
        counts = [-(-length // CHUNK) for length in documents.lengths]  # [D] chunks of each document
        ended = Counter(counts)
        active = list(accumulate((-ended[step] for step in range(1, max(counts))), initial=len(counts)))
        starts = list(accumulate(active, initial=0))
        # first chunk and number of chunks of each step
        self.steps = list(zip(starts, active, strict=False))
        self.size = starts[-1] * CHUNK
        by_length = sorted(range(len(counts)), key=counts.__getitem__, reverse=True)  # stable
        self.by_length = _without_waiting(by_length, number.device)  # [D]
        first = _without_waiting(starts, number.device)[position // CHUNK]
        self.place = (first + self.by_length.argsort()[number]) * CHUNK + position % CHUNK  # [T]

    def fill(self, x: Tensor) -> Tensor:
        """[T, ...] -> [M, C, ...], zeros where a chunk has no token."""
        empty = x.new_zeros(self.size, *x.shape[1:])
        return empty.index_copy(0, self.place, x).unflatten(0, (-1, CHUNK))

    def take(self, x: Tensor) -> Tensor:
        """[M, C, ...] -> [T, ...], the inverse of `fill`."""
        return x.flatten(0, 1).index_select(0, self.place)


def _without_waiting(numbers: list[int], device: torch.device) -> Tensor:
    """[N] int64 on a device, copied from pinned memory so that the host does not wait."""
    return torch.tensor(numbers, pin_memory=device.type == "cuda").to(device, non_blocking=True)


_chunks = lru_cache(maxsize=1)(Chunks)  # all layers of a forward share one object


def _of_heads(projected: Tensor, heads: int, sizes: list[int]) -> tuple[Tensor, ...]:
    """[T, heads * sum(sizes)], the parts of each head together -> [T, heads * size] for each part."""
    parts = projected.unflatten(-1, (heads, -1)).split(sizes, dim=-1)
    return tuple(part.flatten(1) for part in parts)


def _unit(x: Tensor) -> Tensor:
    """x of length 1 in its last dimension, in at least fp32."""
    x = precise(x)
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
