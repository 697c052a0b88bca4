import pytest
import torch

from moe.cross_entropy import IGNORED, chunked_cross_entropy, loss_of_labels, token_log_probs
from moe.kernels import cross_entropy


@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (3, 7), (4, 64), (2, 9001), (0, 5)])
@pytest.mark.parametrize("scale", [1.0, 100.0])  # a large one, so that the maximum moves and sums vanish
def test_a_chunk(device, tokens, vocabulary, scale):
    torch.manual_seed(vocabulary)
    logits = scale * torch.randn(tokens, vocabulary, device=device)
    labels = torch.randint(0, vocabulary, (tokens,), device=device)
    labels[1:2] = IGNORED
    losses, gradient = loss_of_labels(logits.double(), labels, torch.float64, True)
    before = logits.clone()
    quiet = cross_entropy.loss_and_gradient(logits, labels, IGNORED, gradient=False)
    assert torch.equal(logits, before)
    found = cross_entropy.loss_and_gradient(logits, labels, IGNORED, gradient=True)
    assert torch.equal(quiet, found)
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-4, atol=1e-6)
    assert (logits[labels == IGNORED] == 0).all()


@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (3, 7), (4, 64), (2, 9001), (0, 5)])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_a_chunk_with_temperature_entropies_and_scales(device, tokens, vocabulary, scale, temperature):
    torch.manual_seed(vocabulary)
    logits = scale * torch.randn(tokens, vocabulary, device=device)
    labels = torch.randint(0, vocabulary, (tokens,), device=device)
    labels[1:2] = IGNORED
    scales, entropies = torch.randn(tokens, device=device), torch.full((tokens,), 7.0, device=device)
    expected = torch.empty(tokens, dtype=torch.float64, device=device)
    settings = labels, torch.float64, True, scales.double(), expected
    losses, gradient = loss_of_labels(logits.double() / temperature, *settings)
    quiet = cross_entropy.loss_and_gradient(logits, labels, IGNORED, False, temperature, entropies=entropies)
    found = cross_entropy.loss_and_gradient(logits, labels, IGNORED, True, temperature, scales)
    assert torch.equal(quiet, found)
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-4, atol=1e-6)


def test_infinite_and_missing_logits_give_no_finite_loss(device):
    for bad in (float("inf"), float("nan")):
        logits = torch.zeros(1, 9, device=device)
        logits[0, 4] = bad
        assert not cross_entropy.loss_and_gradient(
            logits, torch.zeros(1).long().to(device), -100, True
        ).isfinite()


def test_sixteen_bits(device):
    """The softmax is fp32, and the gradient is rounded once."""
    torch.manual_seed(0)
    logits = torch.randn(3, 300, device=device).half()
    labels = torch.tensor([0, 299, IGNORED], device=device)
    losses, gradient = loss_of_labels(logits.double(), labels, torch.float64, True)
    found = cross_entropy.loss_and_gradient(logits, labels, IGNORED, gradient=True)
    torch.testing.assert_close(found.double(), losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=2**-10, atol=1e-7)


@pytest.mark.parametrize("chunk_bytes", [1, 2000, 10**9])
def test_the_head_with_its_products(device, chunk_bytes):
    torch.manual_seed(1)
    hidden = torch.randn(13, 8, device=device, requires_grad=True)
    weight = torch.randn(50, 8, device=device, requires_grad=True)
    labels = torch.randint(0, 50, (13,), device=device)
    labels[[0, 5]] = IGNORED
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_bytes)
    found = torch.autograd.grad(0.37 * loss, (hidden, weight))
    double = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = torch.nn.functional.cross_entropy(double[0] @ double[1].T, labels, reduction="sum")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    for one, other in zip(found, torch.autograd.grad(0.37 * exact, double), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_bytes", [1, 2000, 10**9])
def test_log_probabilities_with_their_products(device, chunk_bytes):
    torch.manual_seed(1)
    hidden = torch.randn(13, 8, device=device, requires_grad=True)
    weight = torch.randn(50, 8, device=device, requires_grad=True)
    labels, scales = torch.randint(0, 50, (13,), device=device), torch.randn(13, device=device)
    labels[[0, 5]] = IGNORED
    log_probs, entropies = token_log_probs(hidden, weight, labels, 0.6, chunk_bytes)
    found = torch.autograd.grad((scales * log_probs).sum(), (hidden, weight))
    double = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    log_softmax = (double[0] @ double[1].T / 0.6).log_softmax(-1)
    has_loss = labels != IGNORED
    exact = log_softmax.gather(1, labels.clamp(min=0)[:, None])[:, 0] * has_loss
    torch.testing.assert_close(log_probs.double(), exact, rtol=1e-5, atol=1e-5)
    expected = -(log_softmax.exp() * log_softmax).sum(-1) * has_loss
    torch.testing.assert_close(entropies.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, torch.autograd.grad((scales * exact).sum(), double), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
