"""Attention over documents against a dense block-diagonal mask."""

import inspect
import re
import sys
from collections.abc import Callable
from functools import wraps
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from moe import attention
from moe.attention import (
    Attention,
    attend_cached,
    attend_per_document,
    attend_varlen,
    choose_attention,
    prefers_per_document,
)
from moe.cache import Cache
from moe.config import ModelConfig
from moe.documents import Documents
from moe.inputs import LayerInputs
from moe.rope import rotary_tables

HEADS, GROUPS, HEAD_DIM = 6, 2, 8
LAYOUTS = [[4, 4, 4], [12], [1] * 5, [5, 2, 5, 1, 2, 5], [7, 3, 2], [2, 3, 7]]


def _documents(lengths: list[int]) -> Documents:
    return Documents(torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32))


def _inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(tokens, heads, HEAD_DIM, generator=generator, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    )
    return query, key, value


def _dense_mask(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """The reference in fp64: all scores, with -inf for other documents and for future tokens."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    visible = (document[:, None] == document[None, :]).tril()
    q, k, v = (x.double() for x in (query, key, value))
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    scores = torch.einsum("ihc,jhc->hij", q, k) / HEAD_DIM**0.5
    return torch.einsum("hij,jhc->ihc", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("lengths", LAYOUTS, ids=str)
def test_equals_a_dense_mask(lengths: list[int]) -> None:
    inputs = _inputs(sum(lengths))
    direction = torch.randn(sum(lengths), HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    actual = attend_per_document(*inputs, _documents(lengths))
    expected = _dense_mask(*inputs, lengths)
    torch.testing.assert_close(actual, expected.float(), rtol=0, atol=2e-6)
    gradients = torch.autograd.grad((actual * direction).sum(), inputs)
    oracles = torch.autograd.grad((expected * direction).sum(), inputs)
    for gradient, oracle in zip(gradients, oracles, strict=True):
        torch.testing.assert_close(gradient, oracle, rtol=0, atol=5e-6)


def test_documents_of_equal_length_are_one_call() -> None:
    rows = _documents([4, 4, 4])
    assert rows.groups == [(3, 4)]
    assert rows.order is None
    mixed = _documents([5, 2, 5, 1, 2, 5])
    assert mixed.groups == [(1, 1), (2, 2), (3, 5)]
    assert mixed.order is not None
    assert mixed.order[: 1 + 2].tolist() == [12, 5, 6]
    assert mixed.max_length == 5


@pytest.mark.parametrize("lengths", LAYOUTS, ids=str)
def test_varlen_is_called_as_it_documents(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU has no kernel: a function with the documented meaning of each argument replaces it."""
    signature = inspect.signature(varlen.varlen_attn)

    @wraps(varlen.varlen_attn)
    def stand_in(*positional: object, **keywords: object) -> Tensor:
        call = signature.bind(*positional, **keywords).arguments
        assert call["window_size"] == (-1, 0)
        assert call.get("enable_gqa", "enable_gqa" not in signature.parameters)
        borders = call["cu_seq_q"].tolist()
        assert borders == call["cu_seq_k"].tolist()
        lengths = [stop - start for start, stop in pairwise(borders)]
        assert call["max_q"] == call["max_k"] == max(lengths)
        return _dense_mask(call["query"], call["key"], call["value"], lengths).float()

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(attention, "_varlen", attention._varlen.__wrapped__)
    inputs = _inputs(sum(lengths))
    documents = _documents(lengths)
    actual, expected = attend_varlen(*inputs, documents), attend_per_document(*inputs, documents)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel of varlen attention needs a GPU")
@pytest.mark.parametrize("lengths", LAYOUTS, ids=str)
def test_varlen_equals_attention_per_document_on_a_gpu(lengths: list[int]) -> None:
    documents = Documents(_documents(lengths).cu_seqlens.cuda())
    inputs = [x.detach().cuda().bfloat16().requires_grad_() for x in _inputs(sum(lengths))]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    direction = torch.randn_like(inputs[0])
    actual, expected = attend_varlen(*inputs, documents), attend_per_document(*exact, documents)
    gradients = torch.autograd.grad((actual * direction).sum(), inputs)
    oracles = torch.autograd.grad((expected * direction).sum(), exact)
    for result, oracle in zip((actual, *gradients), (expected, *oracles), strict=True):
        assert (result.float() - oracle).abs().max() <= 2**-6 * oracle.abs().max()  # bf16 has 8 bits


def test_cached_attention_sees_all_that_came_before() -> None:
    """The last token of each sequence, among rows of other lengths with something else behind their end."""
    lengths = [4, 2, 7]
    query, key, value = _inputs(sum(lengths))
    last = torch.tensor(lengths).cumsum(0) - 1
    before = [token for token in range(sum(lengths)) if token not in last.tolist()]
    whole = attend_per_document(query, key, value, _documents(lengths))[last]
    cache = Cache(4)
    cache.prefill([9, 9, 9]).add_tokens(0, *torch.full((2, 27, GROUPS, HEAD_DIM), 1e3))
    cache.lengths = []
    step = cache.prefill([length - 1 for length in lengths])
    step.add_tokens(0, key[before], value[before])
    step = cache.decode()
    keys, values = step.add_tokens(0, key[last], value[last])
    assert keys.shape[:2] == (3, 7)
    assert step.visible is not None
    mixed = attend_cached(query[last], keys, values, step.visible)
    torch.testing.assert_close(mixed, whole, rtol=0, atol=2e-6)


def test_which_attention_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, bf16 = torch.device("cuda", 0), torch.bfloat16

    def obstacle(*what: object, capability: tuple[int, int] = (9, 0)) -> str | None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return attention.varlen_obstacle.__wrapped__(*what)

    assert obstacle(gpu, bf16) is None
    assert obstacle(gpu, torch.float16, capability=(8, 0)) is None
    assert "no kernel on cpu" in str(obstacle(torch.device("cpu"), bf16))
    assert "no kernel in torch.float32, and memory grows as length squared" in str(
        obstacle(gpu, torch.float32)
    )
    assert "wants compute capability 8.0, not 7.5" in str(obstacle(gpu, bf16, capability=(7, 5)))
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)  # cannot be imported
    monkeypatch.setattr(attention, "_varlen", attention._varlen.__wrapped__)
    assert "has no torch.nn.attention.varlen; use 2.10 or newer" in str(obstacle(gpu, bf16))


def test_kernel_by_lengths() -> None:
    """The two measured cases, and that few long documents are one call each."""
    generator = torch.Generator().manual_seed(0)
    cuts = torch.rand(63, generator=generator).pow(2).mul(16383).long() + 1
    ragged = [stop - start for start, stop in pairwise(sorted({0, 16384, *cuts.tolist()}))]
    per_document = [[4096] * 4, [16384], [64] * 256, [1], [6000, 10384], [3000, 4000, 4500, 4884]]
    per_document.append([2048] * 8 + [1500])
    varlen = [ragged, list(range(1, 181)), [1, 2], [1024] * 8 + [512] * 16, [3000, 2000]]
    for lengths in per_document + varlen:
        assert prefers_per_document(_documents(lengths)) == (lengths in per_document), lengths
        assert prefers_per_document(_documents(lengths[::-1])) == (lengths in per_document), "any order"


def test_deterministic_runs_take_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not prefers_per_document(_documents([4096] * 4))


def test_forward_takes_the_chosen_kernel(dense_config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def record(name: str) -> Callable[..., Tensor]:
        return lambda query, *_: calls.append(name) or query

    for name in ("attend_varlen", "attend_per_document"):
        monkeypatch.setattr(attention, name, record(name))
    module = Attention(dense_config, 0)
    for obstacle, lengths in ((None, [8]), (None, [3, 5]), ("no kernel", [3, 5])):
        monkeypatch.setattr(attention, "varlen_obstacle", lambda *_, obstacle=obstacle: obstacle)
        documents = _documents(lengths)
        tables = rotary_tables(documents.position, dense_config, torch.float32)
        module(torch.zeros(1, 8, dense_config.hidden_size), LayerInputs(tables, documents))
    assert calls == ["attend_per_document", "attend_varlen", "attend_per_document"]


class _Registry:
    """torch.nn.attention with FA3 and FA4 in the given states; the active one computes varlen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: int, **states: str) -> None:
        self.states, self.active = states, None
        for name in ("activate", "current", "restore"):
            monkeypatch.setattr(torch.nn.attention, f"{name}_flash_attention_impl", getattr(self, name))
        monkeypatch.setattr(attention, "attend_varlen", self.attend)
        monkeypatch.setattr(attention, "varlen_obstacle", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))

    def activate(self, name: str) -> None:
        state = self.states.get(name, "absent")
        if state in ("absent", "half"):
            raise ModuleNotFoundError("none", name="flash_attn.cute" if state == "absent" else "cutlass")
        self.active = name

    def current(self) -> str | None:
        return self.active

    def restore(self) -> None:
        self.active = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
        state = self.states[str(self.active)]
        if state == "raises":
            raise RuntimeError("no such\nhead")
        mixed = attend_per_document(query, key, value, documents)
        if state == "wrong gradient":
            mixed = mixed + (query - query.detach())
        return mixed * torch.nan if state == "nan" else mixed


@pytest.mark.parametrize(
    ("capability", "states", "chosen", "warning"),
    [
        (9, {}, None, None),
        (9, {"FA3": "right", "FA4": "right"}, "FA3", None),
        (10, {"FA3": "right", "FA4": "right"}, "FA4", None),
        (8, {"FA3": "right", "FA4": "right"}, None, None),
        (9, {"FA3": "raises", "FA4": "right"}, "FA4", None),
        (9, {"FA3": "raises"}, None, "FA3 is .* fails here .RuntimeError: no such head.; update it"),
        (9, {"FA4": "nan"}, None, "FA4 is .*relative errors nan"),
        (9, {"FA4": "wrong gradient"}, None, "FA4 is .*relative errors"),
        (9, {"FA4": "half"}, None, "FA4 is .*ModuleNotFoundError"),
    ],
)
def test_newer_flash_attention_after_a_trial(
    dense_config: ModelConfig,
    monkeypatch: pytest.MonkeyPatch,
    capability: int,
    states: dict[str, str],
    chosen: str | None,
    warning: str | None,
) -> None:
    attention._newer_flash.cache_clear()
    registry = _Registry(monkeypatch, capability, **states)
    name, said = choose_attention(dense_config, torch.device("cpu"), torch.bfloat16, False)
    assert name == "varlen or per document" + (f", {chosen}" if chosen else "")
    assert registry.active == chosen
    assert said is None if warning is None else re.match(warning, str(said))
    attention._newer_flash.cache_clear()


def test_attention_without_a_registry_or_in_deterministic_runs(
    dense_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    assert choose_attention(dense_config, cpu, torch.bfloat16, False) == ("per document", None)
    attention._newer_flash.cache_clear()
    registry = _Registry(monkeypatch, 9, FA3="right")
    assert choose_attention(dense_config, cpu, torch.bfloat16, True) == ("varlen", None)
    assert registry.active is None
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    assert choose_attention(dense_config, cpu, torch.bfloat16, False) == ("varlen or per document", None)
    attention._newer_flash.cache_clear()
