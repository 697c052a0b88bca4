import pytest
import torch

from moe.kernels.router import route
from moe.router import Router, RouterStatistics, _route


def compare(device, tokens, experts, top_k, normalize, masked=False, biased=False, scale=1.0):
    """Outputs and gradients of the kernel and of torch for one random direction."""
    torch.manual_seed(tokens + experts)
    logits = scale * torch.randn(tokens, experts, device=device)
    bias = 0.3 * torch.randn(experts, device=device) if biased else None
    mask = torch.rand(tokens, device=device) < 0.6 if masked else None
    results = []
    for path in (route, _route):
        leaf = logits.clone().requires_grad_()
        weights, indices, *sums = path(leaf, bias, mask, top_k, normalize, torch.float32)
        statistics = RouterStatistics(*sums)
        generator = torch.Generator(device).manual_seed(5)
        direction = torch.randn(weights.shape, device=device, generator=generator)
        shared = torch.randn(experts, device=device, generator=generator)
        loss = (weights * direction).sum() + (statistics.probability_sums * shared).sum()
        loss = loss + 0.7 * statistics.z_sums
        (grad,) = torch.autograd.grad(loss, leaf)
        assert not statistics.tokens_per_expert.requires_grad
        results.append((indices, weights.detach(), *(x.detach() for x in statistics[:5]), grad))
    (indices, *found), (expected_indices, *expected) = results
    assert torch.equal(indices, expected_indices)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(1, 1, 1), (1, 8, 8), (16, 8, 2), (17, 12, 3), (33, 128, 8), (5, 60, 4)]
)
@pytest.mark.parametrize("normalize", [True, False])
def test_routing_and_its_gradient(device, tokens, experts, top_k, normalize):
    compare(device, tokens, experts, top_k, normalize)
    compare(device, tokens, experts, top_k, normalize, masked=True, biased=True, scale=20.0)


def test_no_tokens_and_padding_alone(device):
    for mask in (None, torch.zeros(0, dtype=torch.bool, device=device)):
        _, indices, *sums = route(torch.zeros(0, 4, device=device), None, mask, 2, True, torch.float32)
        assert indices.shape == (0, 2)
        assert all((x == 0).all() for x in sums)
    mask = torch.zeros(3, dtype=torch.bool, device=device)
    weights, _, *sums = route(torch.randn(3, 4, device=device), None, mask, 2, True, torch.float32)
    assert all((x == 0).all() for x in sums)
    torch.testing.assert_close(weights.sum(1), torch.ones(3, device=device))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_choices_are_experts_even_without_an_order(device, value):
    logits = torch.full((20, 5), value, device=device)
    indices = route(logits, None, None, 3, True, torch.float32)[1]
    assert ((indices >= 0) & (indices < 5)).all()
    if value == 0:
        assert all(len(set(row)) == 3 for row in indices.tolist())  # equal scores: distinct experts


def test_the_router_uses_it_in_sixteen_bits(device):
    torch.manual_seed(2)
    router = Router(16, 12, 3, True).to(device)
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(9, 16, device=device)
    precise = router(hidden)
    router.to(torch.bfloat16)
    weights, indices, statistics = router(hidden.bfloat16())
    assert weights.dtype == torch.bfloat16
    assert statistics.probability_sums.dtype == torch.float32
    assert (indices == precise[1]).float().mean() > 0.8
    weights.sum().backward()
    assert router.weight.grad.dtype == torch.bfloat16
