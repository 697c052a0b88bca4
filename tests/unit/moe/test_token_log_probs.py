"""Log-probabilities of labels in chunks against torch's of all logits, with gradients, and in the model."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from recorder import Recorder
from torch import Tensor

from moe.config import ModelConfig
from moe.cross_entropy import chunked_cross_entropy, token_log_probs
from moe.model import CausalLM

T, H, V = 29, 8, 50
PER_LOGIT = 12  # bytes: three tensors in fp32
CHUNK = PER_LOGIT * (4 * V + 3)  # at most 4 tokens per chunk in the forward, 6 in the backward


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(T, H, generator=generator)
    weight = torch.randn(V, H, generator=generator)
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[8:12] = -100  # a whole chunk
    labels[[0, 5, 28]] = -100
    labels[1], labels[2] = 0, V - 1
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def _scales() -> Tensor:
    """What each token's log-probability is multiplied by in the loss; of both signs, one of them 0."""
    scales = torch.randn(T, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scales[3] = 0
    return scales


def _oracle(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> list[Tensor]:
    """Log-probabilities, entropies and gradients from all logits in fp64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    log_softmax = (hidden @ weight.T / temperature).log_softmax(-1)
    log_probs, entropies = [], []
    for token, label in enumerate(labels.tolist()):
        nothing = torch.zeros((), dtype=torch.float64)
        log_probs.append(nothing if label == -100 else log_softmax[token, label])
        entropies.append(nothing if label == -100 else -(log_softmax[token].exp() * log_softmax[token]).sum())
    found = [torch.stack(log_probs), torch.stack(entropies)]
    gradients = torch.autograd.grad((_scales() * found[0]).sum(), (hidden, weight))
    return [*(values.detach() for values in found), *gradients]


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
@pytest.mark.parametrize("chunk_bytes", [1, CHUNK, 10**9])
def test_values_and_gradients(dtype: torch.dtype, bound: float, chunk_bytes: int, temperature: float) -> None:
    hidden, weight, labels = _inputs(dtype)
    log_probs, entropies = token_log_probs(hidden, weight, labels, temperature, chunk_bytes)
    assert log_probs.dtype == entropies.dtype == dtype
    assert log_probs.requires_grad
    assert not entropies.requires_grad
    (_scales().to(dtype) * log_probs).sum().backward()
    found = (log_probs.detach(), entropies, hidden.grad, weight.grad)
    for actual, value in zip(found, _oracle(hidden, weight, labels, temperature), strict=True):
        assert _error(actual, value) < bound
    for values in (log_probs, entropies, hidden.grad):
        assert (values[labels == -100] == 0).all()


def test_the_sum_is_the_cross_entropy() -> None:
    hidden, weight, labels = _inputs()
    chunked_cross_entropy(hidden, weight, labels, CHUNK).backward()
    expected = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    (-token_log_probs(hidden, weight, labels, 1.0, CHUNK)[0].sum()).backward()
    for actual, value in zip((hidden.grad, weight.grad), expected, strict=True):
        assert _error(actual, value) < 1e-6


def test_no_grad_gives_the_same_values() -> None:
    hidden, weight, labels = _inputs()
    with torch.no_grad():
        quiet = token_log_probs(hidden, weight, labels, 0.6, CHUNK)
    assert not quiet[0].requires_grad
    for one, other in zip(quiet, token_log_probs(hidden, weight, labels, 0.6, CHUNK), strict=True):
        assert torch.equal(one, other)


def test_two_backwards_are_the_same() -> None:
    """Nothing that the graph keeps is written to."""
    hidden, weight, labels = _inputs()
    loss = token_log_probs(hidden, weight, labels, 0.6, CHUNK)[0].sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(loss, (hidden, weight)), strict=True):
        assert torch.equal(one, other)


def test_the_memory_of_the_weight_may_be_released_until_the_backward() -> None:
    """As ZeRO-3 does: the parameter is emptied after the forward and filled, elsewhere, for the backward."""
    hidden, weight, labels = _inputs()
    log_probs, _ = token_log_probs(hidden, weight, labels, 0.6, CHUNK)
    gathered, again = weight.data, weight.data.clone()
    weight.data = torch.empty(0)
    gathered.fill_(float("nan"))
    weight.data = again
    (_scales().float() * log_probs).sum().backward()
    for actual, value in zip(
        (hidden.grad, weight.grad), _oracle(hidden, weight, labels, 0.6)[2:], strict=True
    ):
        assert _error(actual, value) < 2e-6


def test_frozen_weight() -> None:
    hidden, weight, labels = _inputs()
    log_probs, _ = token_log_probs(hidden, weight.requires_grad_(False), labels, 0.6, CHUNK)
    (_scales().float() * log_probs).sum().backward()
    assert weight.grad is None
    assert _error(hidden.grad, _oracle(hidden, weight, labels, 0.6)[2]) < 1e-6


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(AssertionError):
        token_log_probs(*_inputs(), temperature=0.0)


def test_bf16_sums_the_weight_gradient_in_fp32() -> None:
    """Each token adds 0.5: a sum over the chunks in bf16 would stop growing at 128."""
    hidden = torch.ones(2048, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    log_probs, _ = token_log_probs(hidden, weight, torch.zeros(2048, dtype=torch.int64), 1.0, chunk_bytes=2)
    log_probs.sum().backward()
    assert log_probs.dtype == torch.float32
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.flatten().tolist() == [1024.0, -1024.0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_bf16_logits_are_divided_and_have_a_softmax_in_fp32(temperature: float) -> None:
    """Each logit is one element of the weight, so that only the division and the softmax can round."""
    weight = torch.randn(V, 4, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    labels, hidden = torch.tensor([3, 0, V - 1, 7]), torch.eye(4, dtype=torch.bfloat16)
    log_probs, entropies = token_log_probs(hidden, weight, labels, temperature)
    log_probs.sum().backward()
    log_softmax = (weight.detach().T.double() / temperature).log_softmax(-1)
    assert _error(log_probs.detach(), log_softmax[range(4), labels]) < 1e-6
    assert _error(entropies, -(log_softmax.exp() * log_softmax).sum(-1)) < 1e-6
    expected = (torch.eye(V, dtype=torch.float64)[labels] - log_softmax.exp()).T / temperature
    assert _error(weight.grad, expected) < 2**-8  # rounded once


def test_a_certain_token_has_no_entropy() -> None:
    """Probabilities that are 0 in fp32 add nothing, not 0 * -inf."""
    hidden = torch.tensor([[1.0]], requires_grad=True)
    log_probs, entropies = token_log_probs(hidden, torch.tensor([[500.0], [0.0]]), torch.tensor([0]), 1e-2)
    log_probs.sum().backward()
    assert log_probs.item() == entropies.item() == hidden.grad.item() == 0


@pytest.mark.parametrize("learns", ["all", "hidden", "weight", "no_grad"])
def test_never_holds_all_logits_and_computes_no_more_than_asked(learns: str) -> None:
    tokens, vocabulary, chunk = 480, 1000, 16
    hidden = torch.randn(tokens, 4, requires_grad=learns != "weight")
    weight = torch.randn(vocabulary, 4, requires_grad=learns != "hidden")
    labels = torch.zeros(tokens, dtype=torch.int64)
    with Recorder() as forward, torch.set_grad_enabled(learns != "no_grad"):
        log_probs, _ = token_log_probs(hidden, weight, labels, 0.6, PER_LOGIT * chunk * vocabulary)
    assert forward.largest == chunk * vocabulary  # not tokens * vocabulary
    assert forward.products == tokens // chunk
    if learns != "no_grad":
        with Recorder() as backward:
            log_probs.sum().backward()
        assert backward.largest == chunk * 3 // 2 * vocabulary  # no terms of entropies
        assert backward.products == {"all": 3, "hidden": 2, "weight": 2}[learns] * tokens // (chunk * 3 // 2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ahead", [0, 1])
def test_the_model_returns_them_for_each_position(
    moe_config: ModelConfig,
    build: Callable[..., CausalLM],
    pack: Callable[[list[list[int]]], dict[str, Tensor]],
    tied: bool,
    ahead: int,
) -> None:
    """Of tied embeddings the gradients by head and embedding add up. Nothing looks ahead."""
    config = replace(moe_config, tie_word_embeddings=tied, num_nextn_predict_layers=ahead)
    batch, model = pack([[5, 1, 2, 8], [3, 13]]), build(config).double()
    labels = batch["input_ids"].roll(-1, dims=1)
    labels[0, 3:9] = -100
    output, logits = model(**batch, labels=labels, how=0.6), model(**batch).logits
    assert output.logits is output.cross_entropy_sum is output.mtp_cross_entropy_sum is None
    assert len(output.router.z_sums) == moe_config.num_moe_layers
    log_softmax = (logits / 0.6).log_softmax(-1)
    has_loss = labels != -100
    expected = log_softmax.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * has_loss
    torch.testing.assert_close(output.log_probs, expected)
    entropies = -(log_softmax.exp() * log_softmax).sum(-1) * has_loss
    torch.testing.assert_close(output.entropies, entropies)
    scales = torch.randn(labels.shape, dtype=torch.float64)
    parameters = [parameter for name, parameter in model.named_parameters() if "mtp." not in name]
    ours, slow = (
        torch.autograd.grad((scales * values).sum(), parameters) for values in (output.log_probs, expected)
    )
    for mine, other in zip(ours, slow, strict=True):
        torch.testing.assert_close(mine, other)
