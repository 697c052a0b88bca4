"""Causal attention inside documents: grouped query heads, rotary positions, optional QK-norm and gate."""
# B rows, S tokens per row, T = B*S tokens, D documents, H hidden
# N query heads, G key/value heads, C head_dim, P tokens of the longest cached sequence

from collections.abc import Callable
from functools import cache, partial
from inspect import signature
from typing import Any, cast

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.documents import Documents
from moe.inputs import LayerInputs
from moe.kernels.support import run_on
from moe.norm import ZeroCenteredRMSNorm
from moe.rope import rotate


class Attention(nn.Module):
    """Self-attention of Qwen2 (arXiv 2407.10671), Qwen3 (arXiv 2505.09388) and, with a gate, Qwen3-Next."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.gated = config.attn_output_gate
        hidden, bias = config.hidden_size, config.attention_bias
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        qkv_bias = bias or config.qkv_bias
        self.q_proj = nn.Linear(hidden, query_size * (2 if self.gated else 1), bias=qkv_bias)
        self.k_proj = nn.Linear(hidden, key_value_size, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden, key_value_size, bias=qkv_bias)
        self.o_proj = nn.Linear(query_size, hidden, bias=bias)
        self.q_norm, self.k_norm = _head_norm(config), _head_norm(config)

    def forward(self, hidden: Tensor, inputs: LayerInputs) -> Tensor:
        """hidden [B, S, H] -> [B, S, H]."""
        rows, seq_len, _ = hidden.shape
        documents, cache = inputs.documents, inputs.cache
        heads = (rows * seq_len, -1, self.head_dim)
        query = self.q_proj(hidden)
        if self.gated:  # each head has its query and its gate side by side
            query, gate = query.unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)  # [B, S, N, C]
        query = self.q_norm(query.reshape(heads), inputs)  # [T, N, C]
        key = self.k_norm(self.k_proj(hidden).view(heads), inputs)  # [T, G, C]
        value = self.v_proj(hidden).view(heads)  # [T, G, C]
        if cache is not None:
            keys, values = cache.add_tokens(self.layer, key, value)  # [B, P, G, C]
        if cache is not None and cache.visible is not None:
            mixed = attend_cached(query, keys, values, cache.visible)
        else:
            per_document = varlen_obstacle(query.device, query.dtype) or prefers_per_document(documents)
            attend = attend_per_document if per_document else attend_varlen
            mixed = attend(query, key, value, documents)
        mixed = mixed.reshape(rows, seq_len, -1)
        return self.o_proj(mixed * gate.flatten(2).sigmoid() if self.gated else mixed)


class HeadNorm(nn.RMSNorm):
    """RMSNorm of every head, then its rotary position.

    Both in one module: ZeRO-3 gathers the weight for a call of the module that has it.
    """

    center = 0.0  # what a weight of zero multiplies by

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:  # type: ignore[override]
        """[T, N, C] -> [T, N, C]."""
        if run_on(x):
            from moe.kernels.rotary import normalize_and_rotate

            return normalize_and_rotate(x, self.weight, inputs.rotary, cast(float, self.eps), self.center)
        return rotate(super().forward(x), inputs.rotary)


class ZeroCenteredHeadNorm(HeadNorm, ZeroCenteredRMSNorm):  # type: ignore[misc]
    """`HeadNorm` whose weight is centred at zero."""

    center = 1.0


class Rotary(nn.Module):
    """The rotary position of every head of a model without QK-norm."""

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        """[T, N, C] -> [T, N, C]."""
        return rotate(x, inputs.rotary)


def _head_norm(config: ModelConfig) -> nn.Module:
    if not config.use_qk_norm:
        return Rotary()
    kind = ZeroCenteredHeadNorm if config.zero_centered_norm else HeadNorm
    return kind(config.head_dim, eps=config.rms_norm_eps)


# One H200, 32/4 heads of 128, forward and backward, in ms: 4 documents of 4,096: varlen 6.85, per document
# 3.96; 64 ragged documents, 16,384 tokens: varlen 2.51, per document 9.02. From these two: per document saves
# 0.043 for a million of length^2, and each length costs 0.13, or a length^2 of 1,750^2. A guess, not
# measured: sorting the tokens and back costs as much as a length^2 of 1,024 for each token.
_CALL, _MOVE = 2048**2, 1024


def prefers_per_document(documents: Documents) -> bool:
    """Whether `attend_per_document` is chosen on a device that can run `attend_varlen` too.

    It depends on the lengths alone. deterministic=true always takes varlen, whose backward then repeats.
    """
    if torch.are_deterministic_algorithms_enabled():
        return False
    if len(documents.groups) == 1:
        return True
    squares = sum(count * length**2 for count, length in documents.groups)
    tokens = sum(documents.lengths)
    return squares >= _CALL * len(documents.groups) + _MOVE * tokens


@cache
def varlen_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `attend_varlen` cannot run on `device` in `dtype`, and a remedy; None if it can and is used."""
    if device.type != "cuda":
        return f"flash attention has no kernel on {device.type}; use a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention has no kernel in {dtype}, and memory grows as length squared; use dtype=bf16"
    if _varlen() is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen; use 2.10 or newer"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"flash attention wants compute capability 8.0, not {capability[0]}.{capability[1]}"
    return None


def choose_attention(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, deterministic: bool
) -> tuple[str, str | None]:
    """The name of what computes attention in this process, and a warning if it could be faster.

    Switches torch to FlashAttention-3 or -4 if one is installed and right: for varlen, and for SDPA where
    torch's own choice is flash attention.
    """
    if obstacle := varlen_obstacle(device, dtype):
        slow = f"attention is computed document by document: {obstacle}" if device.type == "cuda" else None
        return "per document", slow
    if deterministic:
        return "varlen", None
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    version, failure = _newer_flash(device, dtype, heads, config.head_dim)
    return "varlen or per document" + (f", {version}" if version else ""), failure


# Names in torch's registry, and the compute capabilities 9.x and 10.x that torch accepts for them.
_NEWER_FLASH = {"FA3": (9,), "FA4": (9, 10)}


@cache
def _newer_flash(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], head_dim: int
) -> tuple[str | None, str | None]:
    """The newer flash attention that torch uses from now on, or None; what is wrong with those refused."""
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):  # older torch
        return None, None
    failures = []
    major = torch.cuda.get_device_capability(device)[0]
    for name in [name for name, majors in _NEWER_FLASH.items() if major in majors]:
        try:
            torch.nn.attention.activate_flash_attention_impl(name)
            _try_attention(device, dtype, heads, head_dim)
            return name, None
        except Exception as error:  # whatever the error is, training continues with torch's own kernels
            if torch.nn.attention.current_flash_attention_impl():
                torch.nn.attention.restore_flash_attention_impl()
            if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("flash_attn"):
                continue  # not installed
            said = " ".join(f"{type(error).__name__}: {error}".split())
            failures.append(f"{name} is installed and not used: it fails here ({said}); update it")
    return None, "; ".join(failures) or None


def _try_attention(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], head_dim: int
) -> None:
    """Raise if attention of a few tokens or its gradients differ from fp32; heads: query, key, value."""
    documents = Documents(torch.tensor([0, 70, 71, 200, 329], dtype=torch.int32, device=device))
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(329, count, head_dim, generator=generator).to(device, dtype) for count in heads]

    def results(attend: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        given = [x.detach().to(kind).requires_grad_() for x in drawn]
        mixed = attend(*given, documents)
        return [mixed.detach(), *torch.autograd.grad(mixed.float().square().sum(), given)]

    with torch.inference_mode(False), torch.enable_grad():
        expected = results(attend_per_document, torch.float32)
        for attend in (attend_varlen, attend_per_document):
            pairs = list(zip(results(attend, dtype), expected, strict=True))
            errors = [float((mine.float() - right).norm() / right.norm()) for mine, right in pairs]
            if not all(error <= 2**-5 for error in errors):  # also for NaN
                raise ArithmeticError("relative errors " + ", ".join(f"{error:.1e}" for error in errors))


def attend_per_document(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """One SDPA call for each document length, on any device: [T, N, C] and twice [T, G, C] -> [T, N, C]."""
    if documents.order is not None:
        query, key, value = (x.index_select(0, documents.order) for x in (query, key, value))
    sizes = [count * length for count, length in documents.groups]
    parts = []
    splits = zip(documents.groups, query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
    for (count, _), *group in splits:
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in group)  # [count, heads, length, C]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        parts.append(mixed.transpose(1, 2).flatten(0, 1))
    mixed = torch.cat(parts) if len(parts) > 1 else parts[0]
    return mixed if documents.inverse is None else mixed.index_select(0, documents.inverse)


def attend_varlen(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """One flash-attention call over all documents, CUDA and 16 bits only: shapes of `attend_per_document`."""
    borders, longest = documents.cu_seqlens, documents.max_length
    lengths = (borders, borders, longest, longest)  # of queries, of keys
    return cast(Callable[..., Tensor], _varlen())(query, key, value, *lengths)


@cache
def _varlen() -> Callable[..., Any] | None:
    """torch's causal varlen attention with groups of query heads, or None; old versions always group them.

    It is imported here because the import takes a second, and only a GPU has the kernel.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    grouped: Any = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    return partial(varlen_attn, window_size=(-1, 0), **grouped)  # all to the left, nothing to the right


def attend_cached(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """One token of each sequence attends to the tokens of its sequence that are `visible` [B, P] bool.

    query [B, N, C], keys and values [B, P, G, C] -> [B, N, C]. The query heads of one key head are given as
    tokens that see the same, so that no key is repeated.
    """
    q = query.unflatten(1, (keys.shape[2], -1))  # [B, G, N/G, C]
    k, v = keys.transpose(1, 2), values.transpose(1, 2)  # [B, G, P, C]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None]).flatten(1, 2)
