"""Chunked cross entropy against torch's, with gradients, and without a [T, V] tensor."""

import pytest
import torch
import torch.nn.functional as F
from recorder import Recorder
from torch import Tensor

from moe.cross_entropy import chunked_cross_entropy

T, H, V = 29, 8, 50
PER_LOGIT = 8  # bytes: two tensors in fp32
CHUNK = PER_LOGIT * (4 * V + 3)  # at most 4 tokens per chunk


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(T, H, generator=generator)
    weight = torch.randn(V, H, generator=generator)
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[8:12] = -100  # a whole chunk
    labels[[0, 5, 28]] = -100
    labels[1], labels[2] = 0, V - 1
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def _oracle(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    return loss.detach(), *torch.autograd.grad(scale * loss, (hidden, weight))


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("chunk_bytes", [1, CHUNK, 2 * PER_LOGIT * T * V, 10**9])
def test_loss_and_gradients(dtype: torch.dtype, bound: float, chunk_bytes: int) -> None:
    hidden, weight, labels = _inputs(dtype)
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_bytes)
    (0.37 * loss).backward()
    expected = _oracle(hidden, weight, labels, 0.37)
    assert loss.dtype == dtype
    for actual, value in zip((loss.detach(), hidden.grad, weight.grad), expected, strict=True):
        assert _error(actual, value) < bound
    assert (hidden.grad[labels == -100] == 0).all()


def test_no_grad_gives_the_same_loss() -> None:
    hidden, weight, labels = _inputs()
    with torch.no_grad():
        quiet = chunked_cross_entropy(hidden, weight, labels, CHUNK)
    assert not quiet.requires_grad
    assert torch.equal(quiet, chunked_cross_entropy(hidden, weight, labels, CHUNK))


def test_all_masked() -> None:
    hidden, weight, labels = _inputs()
    loss = chunked_cross_entropy(hidden, weight, torch.full_like(labels, -100), CHUNK)
    loss.backward()
    assert loss.item() == 0
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_frozen_weight() -> None:
    hidden, weight, labels = _inputs()
    chunked_cross_entropy(hidden, weight.requires_grad_(False), labels, CHUNK).backward()
    assert weight.grad is None
    assert _error(hidden.grad, _oracle(hidden, weight, labels)[1]) < 1e-6


def test_bf16_sums_the_weight_gradient_in_fp32() -> None:
    """Each token adds 0.5: a sum over the chunks in bf16 would stop growing at 128."""
    hidden = torch.ones(2048, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.zeros(2048, dtype=torch.int64), chunk_bytes=2)
    loss.backward()
    assert loss.dtype == torch.float32
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.flatten().tolist() == [-1024.0, 1024.0]


def test_bf16_logits_have_a_softmax_in_fp32() -> None:
    """Each logit is one element of the weight, so that only the softmax can round."""
    weight = torch.randn(V, 4, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    labels = torch.tensor([3, 0, V - 1, 7])
    loss = chunked_cross_entropy(torch.eye(4, dtype=torch.bfloat16), weight, labels)
    expected = F.cross_entropy(weight.detach().T.double(), labels, reduction="sum")
    assert _error(loss.detach(), expected) < 1e-6


def test_second_backward_is_an_error() -> None:
    hidden, weight, labels = _inputs()
    loss = chunked_cross_entropy(hidden, weight, labels, CHUNK)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("learns", "products"), [("all", 3), ("hidden", 2), ("weight", 2), ("no_grad", 1)])
def test_never_holds_all_logits_and_computes_no_more_than_asked(learns: str, products: int) -> None:
    tokens, vocabulary, chunk = 512, 1000, 16
    hidden = torch.randn(tokens, 4, requires_grad=learns != "weight")
    weight = torch.randn(vocabulary, 4, requires_grad=learns != "hidden")
    labels = torch.zeros(tokens, dtype=torch.int64)
    with Recorder() as recorder, torch.set_grad_enabled(learns != "no_grad"):
        loss = chunked_cross_entropy(hidden, weight, labels, PER_LOGIT * chunk * vocabulary)
        if learns != "no_grad":
            loss.backward()
    assert recorder.largest == chunk * vocabulary  # not tokens * vocabulary
    assert recorder.products == products * tokens // chunk


def test_few_logits_are_one_chunk() -> None:
    hidden, weight, labels = _inputs()
    with Recorder() as recorder:
        chunked_cross_entropy(hidden, weight, labels).backward()
    assert recorder.products == 3
