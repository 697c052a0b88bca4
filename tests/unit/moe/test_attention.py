"""Attention over documents against a dense block-diagonal mask."""

import inspect
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from moe import attention
from moe.attention import attend_cached, attend_per_document, attend_varlen
from moe.inputs import Cache, Documents

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
    signature = inspect.signature(attention.varlen_attn)

    def stand_in(*positional: object, **keywords: object) -> Tensor:
        call = signature.bind(*positional, **keywords).arguments
        assert call["window_size"] == (-1, 0)
        assert call.get("enable_gqa", "enable_gqa" not in signature.parameters)
        borders = call["cu_seq_q"].tolist()
        assert borders == call["cu_seq_k"].tolist()
        lengths = [stop - start for start, stop in pairwise(borders)]
        assert call["max_q"] == call["max_k"] == max(lengths)
        return _dense_mask(call["query"], call["key"], call["value"], lengths).float()

    monkeypatch.setattr(attention, "varlen_attn", stand_in)
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
    rows, seq_len, seen = 2, 7, 4
    flat = _inputs(rows * seq_len)
    query, key, value = (x.unflatten(0, (rows, seq_len)) for x in flat)
    whole = attend_per_document(*flat, _documents([seq_len] * rows)).unflatten(0, (rows, seq_len))
    cache = Cache()
    for part in (slice(0, seen), slice(seen, 6), slice(6, 7)):
        keys, values = cache.append(0, key[:, part], value[:, part])
        torch.testing.assert_close(
            attend_cached(query[:, part], keys, values), whole[:, part], rtol=0, atol=2e-6
        )


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
    monkeypatch.setattr(attention, "varlen_attn", None)
    assert "has no torch.nn.attention.varlen; use 2.10 or newer" in str(obstacle(gpu, bf16))
