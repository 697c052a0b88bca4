"""Linear attention: the chunked rule against the recurrence in fp64, and the separation of documents."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe import gated_delta_net
from moe.documents import Documents
from moe.gated_delta_net import (
    CausalConvolution,
    DeltaInputs,
    GatedRMSNorm,
    chunked_delta_rule,
    delta_step,
    fused_delta_rule,
    last_inputs,
    recurrent_delta_rule,
)

Rule = Callable[..., tuple[Tensor, Tensor]]
HEADS, KEY, VALUE = 3, 8, 10
LAYOUTS = [[5], [64], [65], [1, 1, 1], [3, 130, 64, 7], [200, 1, 63, 128]]


def _documents(lengths: list[int]) -> Documents:
    return Documents(torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32))


def _inputs(lengths: list[int], decay: float = 4.0) -> tuple[DeltaInputs, Tensor]:
    """Random tokens and states, fp64, with gradients."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query, key = (F.normalize(draw(tokens, HEADS, KEY), dim=-1) for _ in range(2))
    log_decay = -decay * torch.rand(tokens, HEADS, generator=generator, dtype=torch.float64)
    x = DeltaInputs(query, key, draw(tokens, HEADS, VALUE), log_decay, draw(tokens, HEADS).sigmoid())
    for part in x:
        part.requires_grad_()
    return x, draw(len(lengths), HEADS, KEY, VALUE).requires_grad_()


@pytest.mark.parametrize("decay", [0.01, 20.0])
@pytest.mark.parametrize("lengths", LAYOUTS, ids=str)
def test_chunks_equal_the_recurrence(lengths: list[int], decay: float) -> None:
    x, state = _inputs(lengths, decay)
    results = [rule(x, _documents(lengths), state) for rule in (chunked_delta_rule, recurrent_delta_rule)]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in results[0]]
    gradients = [
        torch.autograd.grad(sum((y * d).sum() for y, d in zip(ys, directions, strict=True)), [*x, state])
        for ys in results
    ]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("decay", [0.01, 20.0])
def test_chunks_in_fp32_keep_their_digits(decay: float) -> None:
    """Sums of strong decays over a chunk are large: their differences must keep fp32 precision."""
    x, state = _inputs([130, 70], decay)
    expected, _ = recurrent_delta_rule(x, _documents([130, 70]), state)
    rounded = DeltaInputs(*(part.float() for part in x))
    actual, _ = chunked_delta_rule(rounded, _documents([130, 70]), state.float())
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().max() < 1e-6 * expected.abs().max()


def test_the_recurrence_by_hand() -> None:
    """One head of dims 1: s = a s; s += k b (v - k s); y = q s."""
    values = torch.tensor([[0.5, 2.0, 3.0, -0.1, 0.25], [1.0, -1.0, 4.0, -0.7, 0.5]], dtype=torch.float64)
    query, key, value, log_decay, beta = values.t().unsqueeze(-1)
    x = DeltaInputs(query[..., None], key[..., None], value[..., None], log_decay, beta)
    state = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    outputs, last = recurrent_delta_rule(x, _documents([2]), state)
    s, expected = 2.0, []
    for q, k, v, g, b in values.tolist():
        s = s * torch.tensor(g).exp().item()
        s += k * b * (v - k * s)
        expected.append(q * s)
    torch.testing.assert_close(outputs.flatten().tolist(), expected, rtol=1e-6, atol=0)
    assert last.item() == pytest.approx(s, rel=1e-6)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_states_stay_inside_documents(changed: int) -> None:
    """Other tokens in one document change no bit of the outputs and last states of the others."""
    lengths = [70, 130, 9]
    borders = list(accumulate(lengths, initial=0))
    part = slice(borders[changed], borders[changed + 1])
    x, state = _inputs(lengths)
    other = DeltaInputs(*(tensor.detach().clone() for tensor in x))
    for tensor in other:
        tensor[part] *= 0.5
    for rule in (chunked_delta_rule, recurrent_delta_rule):
        (a, a_last), (b, b_last) = (rule(inputs, _documents(lengths), state) for inputs in (x, other))
        kept = torch.ones(sum(lengths), dtype=torch.bool)
        kept[part] = False
        assert torch.equal(a[kept], b[kept])
        assert not torch.equal(a[part], b[part])
        same = [torch.equal(p, q) for p, q in zip(a_last, b_last, strict=True)]
        assert same == [document != changed for document in range(3)]


@pytest.mark.parametrize("lengths", [[9], [1, 2, 5, 1], [4, 4]], ids=str)
@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution_inside_documents(lengths: list[int], width: int) -> None:
    features = 6
    convolution = CausalConvolution(features, width).double()
    torch.nn.init.normal_(convolution.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(sum(lengths), features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    actual = convolution(x, _documents(lengths), None)
    for document, mixed in zip(x.split(lengths), actual.split(lengths), strict=True):
        padded = F.pad(document, (0, 0, width - 1, 0))
        windows = padded.unfold(0, width, 1)  # [length, F, W]
        expected = F.silu((windows * convolution.weight[:, 0]).sum(-1))
        torch.testing.assert_close(mixed, expected)


def test_a_convolution_goes_on() -> None:
    convolution = CausalConvolution(3, 4)
    torch.nn.init.normal_(convolution.weight)
    x = torch.randn(2, 7, 3)
    whole = convolution(x.flatten(0, 1), _documents([7, 7]), None).unflatten(0, (2, -1))
    last = convolution(x[:, 6], _documents([1, 1]), x[:, 3:6])
    torch.testing.assert_close(last, whole[:, 6])


def test_the_last_inputs_reach_back_before_a_short_document() -> None:
    seen, lengths = torch.randn(4, 3, 2), [1, 5, 2, 3]
    documents = torch.randn(11, 2).split(lengths)
    found = last_inputs(torch.cat(documents), _documents(lengths), seen)
    for before, document, last in zip(seen, documents, found, strict=True):
        assert torch.equal(last, torch.cat((before, document))[-3:])


@pytest.mark.parametrize("decay", [0.01, 5.0])
def test_a_step_is_one_token_of_the_recurrence(decay: float) -> None:
    x, state = _inputs([1] * 4, decay)
    expected, after = recurrent_delta_rule(x, _documents([1] * 4), state)
    held = state.detach().clone()
    with torch.no_grad():
        mixed, last = delta_step(x, held)
    assert last is held
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(last, after)


def _rounding(x: DeltaInputs, documents: Documents, state: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds the output to 16 bits, as the kernel does."""
    mixed, last = chunked_delta_rule(x, documents, state)
    return mixed.to(x.value.dtype), last


def _failing(x: DeltaInputs, documents: Documents, state: Tensor) -> tuple[Tensor, Tensor]:
    raise ImportError("cannot import name\n'chunk_gated_delta_rule'")


class _BrokenBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _with_gradients(factor: float) -> Rule:
    return lambda x, *rest: _rounding(x._replace(key=_BrokenBackward.apply(x.key, factor)), *rest)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (_rounding, None),
        (_failing, "fails here (ImportError: cannot import name 'chunk_gated_delta_rule'); update"),
        (lambda x, *rest: (_rounding(x, *rest)[0] * 1.1, rest[1]), "computes wrong here"),
        (_with_gradients(1.0), None),
        (_with_gradients(1.1), "computes wrong here"),
        (_with_gradients(float("nan")), "computes wrong here (relative errors "),
    ],
    ids=["right", "raises", "forward", "right backward", "backward", "NaN"],
)
def test_a_kernel_is_taken_only_where_it_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, rule: Rule, message: str | None
) -> None:
    monkeypatch.setattr(gated_delta_net, "fused_delta_rule", rule)
    with torch.inference_mode():  # the first forward may run in this mode
        found = gated_delta_net._probe.__wrapped__(torch.device("cpu"), torch.bfloat16, 16, 12)
    assert found is None if message is None else message in str(found)


def test_where_the_kernel_is_not_even_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(gated_delta_net, "_probe", lambda *what: f"tried {what}")
    monkeypatch.setattr(gated_delta_net, "HAS_KERNEL", True)
    obstacle = gated_delta_net.kernel_obstacle
    assert "no kernel on cpu" in str(obstacle(torch.device("cpu"), torch.bfloat16, 8, 8))
    assert "16 bits, not in torch.float32" in str(obstacle(gpu, torch.float32, 8, 8))
    assert str(obstacle(gpu, torch.bfloat16, 8, 16)).startswith("tried")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert "deterministic=true" in str(obstacle(gpu, torch.bfloat16, 8, 8))
    monkeypatch.undo()
    monkeypatch.setattr(gated_delta_net, "HAS_KERNEL", False)
    assert "pip install flash-linear-attention" in str(obstacle(gpu, torch.bfloat16, 8, 8))


@pytest.mark.skipif(
    not (torch.cuda.is_available() and gated_delta_net.HAS_KERNEL),
    reason="needs a GPU and flash-linear-attention",
)
@pytest.mark.parametrize("lengths", LAYOUTS, ids=str)
def test_the_kernel_equals_the_chunks(lengths: list[int]) -> None:
    exact, state = _inputs(lengths)
    documents = Documents(_documents(lengths).cu_seqlens.cuda())
    bf16 = DeltaInputs(*(part.detach().cuda().bfloat16().requires_grad_() for part in exact))
    bf16 = bf16._replace(log_decay=exact.log_decay.detach().cuda().float().requires_grad_())
    fp32 = DeltaInputs(*(part.detach().float().requires_grad_() for part in bf16))
    state = state.detach().cuda().float()
    results = [
        rule(x, documents, state)[0] for rule, x in ((fused_delta_rule, bf16), (chunked_delta_rule, fp32))
    ]
    gradients = [
        torch.autograd.grad(y.float().square().sum(), x) for y, x in zip(results, (bf16, fp32), strict=True)
    ]
    for actual, expected in zip((results[0], *gradients[0]), (results[1], *gradients[1]), strict=True):
        assert (actual.float() - expected).abs().max() <= 2**-5 * expected.abs().max()


def test_the_gated_norm_rounds_once() -> None:
    """In bf16, the result is the exact value rounded to 8 binary digits."""
    norm = GatedRMSNorm(32, eps=1e-6).bfloat16()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(32, generator=generator))
    x, gate = torch.randn(2, 500, 32, generator=generator).bfloat16()
    exact = F.rms_norm(x.double(), (32,), norm.weight.double(), 1e-6) * F.silu(gate.double())
    assert ((norm(x, gate).double() - exact).abs() <= 2**-8 * 1.001 * exact.abs()).all()
