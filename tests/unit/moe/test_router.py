"""The router against definitions written out token by token."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.router import Router, RouterStatistics, RoutingInputs, TrainingRouting, stack_statistics

# T tokens, H hidden, E experts, K experts per token

T, H, E, K = 13, 16, 8, 3


def build(norm_topk_prob: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Router, Tensor]:
    torch.manual_seed(0)
    router = Router(H, E, K, norm_topk_prob)
    torch.nn.init.normal_(router.weight)
    return router.to(dtype), torch.randn(T, H).to(dtype).requires_grad_()


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_softmax_over_all_experts_then_top_k(norm_topk_prob: bool) -> None:
    router, hidden = build(norm_topk_prob)
    routing_weights, expert_indices, _ = router(hidden)
    probabilities = (hidden.double() @ router.weight.double().t()).softmax(-1)
    for token in range(T):
        chosen = probabilities[token].argsort(descending=True)[:K]
        assert expert_indices[token].tolist() == chosen.tolist()
        expected = probabilities[token, chosen]
        if norm_topk_prob:
            expected = expected / expected.sum()
        torch.testing.assert_close(routing_weights[token].double(), expected, rtol=1e-5, atol=0)


def test_bf16_is_computed_in_fp32() -> None:
    router, hidden = build(dtype=torch.bfloat16)
    routing_weights, expert_indices, statistics = router(hidden)
    exact, same = build()
    exact.weight.data.copy_(router.weight)
    expected, expected_indices, expected_statistics = exact(same.detach().copy_(hidden))
    assert routing_weights.dtype == torch.bfloat16
    assert torch.equal(routing_weights, expected.bfloat16())
    assert torch.equal(expert_indices, expected_indices)
    for value, other in zip(statistics[:5], expected_statistics[:5], strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, other)


def test_statistics_of_the_tokens_that_count() -> None:
    router, hidden = build()
    token_mask = torch.arange(T) % 3 != 0
    with torch.no_grad():
        hidden[0] *= 100  # of padding: the widest logits
        hidden[3::3] /= 100  # of padding: the largest entropy
    _, expert_indices, statistics = router(hidden, token_mask)
    logits = (hidden.double() @ router.weight.double().t())[token_mask]
    probabilities = logits.softmax(-1)
    counts = [0] * E
    for token in expert_indices[token_mask].tolist():
        for expert in token:
            counts[expert] += 1
    assert statistics.tokens_per_expert.tolist() == counts
    expected = [
        probabilities.sum(0),
        logits.exp().sum(-1).log().square().sum(),
        -(probabilities * probabilities.log()).sum(),
        (logits.amax(-1) - logits.amin(-1)).max(),
    ]
    for value, exact in zip(statistics[1:5], expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)


def test_gradients_of_statistics() -> None:
    router, hidden = build()
    token_mask = torch.arange(T) % 3 != 0
    statistics = router(hidden, token_mask)[2]
    assert not statistics.tokens_per_expert.requires_grad
    assert not statistics.entropy_sums.requires_grad
    scale = torch.randn(E)
    logits = (hidden @ router.weight.t())[token_mask]
    plain = {
        "probability_sums": (logits.softmax(-1).sum(0) * scale).sum(),
        "z_sums": logits.logsumexp(-1).square().sum() * scale.sum(),
    }
    for key, expected in plain.items():
        value = getattr(statistics, key)
        loss = (value * scale).sum()
        leaves = [hidden, router.weight]
        grads = torch.autograd.grad(loss, leaves, retain_graph=True)
        for grad, exact in zip(grads, torch.autograd.grad(expected, leaves, retain_graph=True), strict=True):
            torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-6)


def test_bf16_gradients_are_rounded_once() -> None:
    router, hidden = build(dtype=torch.bfloat16)
    router(hidden)[2].z_sums.backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, router.weight)]
    (exact[0] @ exact[1].t()).logsumexp(-1).square().sum().backward()
    for leaf, expected in zip((hidden, router.weight), exact, strict=True):
        error = (leaf.grad.double() - expected.grad).abs()
        half_a_digit = 2**-8 * 1.001 * expected.grad.abs()  # bf16 has 8 binary digits
        assert (error <= half_a_digit + 1e-6 * expected.grad.abs().max()).all()


def test_gradients_of_routing_weights() -> None:
    router, hidden = build()
    routing_weights, expert_indices, _ = router(hidden)
    probabilities = (hidden @ router.weight.t()).softmax(-1).gather(1, expert_indices)
    plain = probabilities / probabilities.sum(-1, keepdim=True)
    scale = torch.randn(T, K)
    leaves = [hidden, router.weight]
    grads = torch.autograd.grad((routing_weights * scale).sum(), leaves)
    for grad, exact in zip(grads, torch.autograd.grad((plain * scale).sum(), leaves), strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-6)


def test_no_tokens() -> None:
    router, hidden = build()
    routing_weights, expert_indices, statistics = router(hidden[:0], torch.ones(0, dtype=torch.bool))
    assert routing_weights.shape == expert_indices.shape == (0, K)
    assert all((value == 0).all() for value in statistics[:5])
    (statistics.probability_sums.sum() + statistics.z_sums + routing_weights.sum()).backward()
    assert torch.equal(router.weight.grad, torch.zeros(E, H))


def test_stack_statistics() -> None:
    layers = [
        RouterStatistics(torch.full((E,), v), torch.full((E,), v + 1), *map(torch.tensor, (v, v + 2, v + 3)))
        for v in (1.0, 5.0)
    ]
    stacked = stack_statistics(layers)
    assert [value.shape for value in stacked[:5]] == [(2, E), (2, E), (2,), (2,), (2,)]
    for layer, expected in enumerate(layers):
        assert all(
            torch.equal(value[layer], other) for value, other in zip(stacked[:5], expected[:5], strict=True)
        )


def test_a_selection_bias_moves_the_choice_and_not_the_weights():
    torch.manual_seed(0)
    router = Router(8, 6, 2, norm_topk_prob=False)
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(5, 8)
    bias = torch.zeros(6)
    bias[3] = 10.0
    weights, indices, _ = router(hidden, selection_bias=bias)
    assert (indices == 3).any(dim=1).all()
    probabilities = F.linear(hidden, router.weight).softmax(-1)
    torch.testing.assert_close(weights, probabilities.gather(-1, indices))


def test_each_layer_has_its_own_bias_and_noise() -> None:
    bias = torch.arange(6.0).view(2, 3)
    inputs = RoutingInputs(selection_bias=bias, training=TrainingRouting(0.1, None, ["a", "b"]))
    for layer, sparse_layer in ((1, 0), (3, 1)):  # layers 0 and 2 are dense
        of_layer = inputs.of_layer(layer, sparse_layer)
        assert torch.equal(of_layer.selection_bias, bias[sparse_layer])
        assert of_layer.training.keys == [f"a:{layer}", f"b:{layer}"]
