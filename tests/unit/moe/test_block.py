"""The block: router, dispatcher and experts put together."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe.block import MoEBlock
from moe.router import RoutingInputs, TrainingRouting, jittered, within_capacity

# B rows, S positions, H hidden, E experts, K experts per token

B, S, H, E, K = 2, 6, 16, 8, 3


def build(
    backend: str = "loop", shared: int = 0, recompute: str = "none"
) -> tuple[MoEBlock, torch.Tensor, torch.Tensor]:
    """The block, hidden [B,S,H], token_mask [B,S]."""
    config = SimpleNamespace(  # the keys of ModelConfig that a block reads
        hidden_size=H,
        num_experts=E,
        num_experts_per_tok=K,
        moe_intermediate_size=8,
        norm_topk_prob=True,
        shared_expert_intermediate_size=shared,
        shared_expert_gate=False,
    )
    torch.manual_seed(0)
    block = MoEBlock(config, backend, recompute)
    for weight in block.parameters():
        torch.nn.init.normal_(weight)
    return block, torch.randn(B, S, H, requires_grad=True), torch.arange(B * S).view(B, S) % 5 != 0


def test_parameter_names_and_shapes() -> None:
    block, _, _ = build()
    assert {name: tuple(weight.shape) for name, weight in block.named_parameters()} == {
        "gate.weight": (E, H),
        "experts.gate_up_proj": (E, 16, H),
        "experts.down_proj": (E, H, 8),
    }


@pytest.mark.parametrize("backend", ["reference", "loop", "grouped"])
def test_every_token_is_routed_and_padding_only_leaves_the_statistics(backend: str) -> None:
    block, hidden, token_mask = build(backend)
    y, statistics = block(hidden, RoutingInputs(token_mask))
    assert y.shape == (B, S, H)
    assert statistics.tokens_per_expert.sum() == K * token_mask.sum()
    for b in range(B):
        for s in range(S):
            weights, indices, _ = block.gate(hidden[b, s : s + 1])
            expected = block.experts(hidden[b, s : s + 1], weights, indices)[0]
            torch.testing.assert_close(y[b, s], expected, rtol=1e-5, atol=1e-4)
    assert block(hidden)[1].tokens_per_expert.sum() == K * B * S


def test_recompute_changes_nothing() -> None:
    block, hidden, token_mask = build()
    plain, plain_statistics = block(hidden, RoutingInputs(token_mask))
    y, statistics = checkpoint(block, hidden, RoutingInputs(token_mask), use_reentrant=False)
    for value, expected in zip((y, *statistics[:5]), (plain, *plain_statistics[:5]), strict=True):
        assert torch.equal(value, expected)
    leaves = [hidden, *block.parameters()]
    losses = [
        out.square().sum() + stat.probability_sums.square().sum() + stat.z_sums
        for out, stat in ((plain, plain_statistics), (y, statistics))
    ]
    expected_grads = torch.autograd.grad(losses[0], leaves)
    losses[1].backward()
    for leaf, expected in zip(leaves, expected_grads, strict=True):
        assert torch.equal(leaf.grad, expected)


def test_noise_and_bias_act_on_the_router_alone_and_padding_is_dropped_first() -> None:
    block, hidden, token_mask = build()
    bias, keys, mask, x = torch.linspace(-1, 1, E), ["a", "b"], token_mask.flatten(), hidden.flatten(0, 1)
    y, statistics = block(hidden, RoutingInputs(token_mask, bias, TrainingRouting(0.3, 0.5, keys)))

    noisy = jittered(hidden, 0.3, keys).flatten(0, 1)
    weights, indices, expected = block.gate(noisy, mask, bias)
    kept = within_capacity(weights, indices, E, 0.5, mask)
    assert torch.equal(y.flatten(0, 1), block.experts(x, weights, kept))
    for value, other in zip(statistics[:5], expected[:5], strict=True):
        assert torch.equal(value, other)
    # each of them matters here
    assert not torch.equal(indices, block.gate(noisy, mask)[1])
    assert not torch.equal(weights, block.gate(x, mask, bias)[0])
    assert not torch.equal(kept, within_capacity(weights, indices, E, 0.5))


@pytest.mark.parametrize(("recompute", "times"), [("none", 1), ("experts", 2), ("local", 2)])
def test_a_shared_expert_is_computed_again(recompute: str, times: int) -> None:
    block, hidden, _ = build(shared=4, recompute=recompute)
    calls = []
    block.shared_expert.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    block(hidden)[0].sum().backward()
    assert len(calls) == times
