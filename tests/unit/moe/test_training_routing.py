"""Router jitter and expert capacity, used only in training, against slow versions."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.block import MoEBlock
from moe.config import ModelConfig
from moe.model import CausalLM
from moe.router import RoutingInputs, TrainingRouting, jittered, within_capacity

# T tokens, E experts, K experts per token
T, E, K = 40, 6, 2


def routed(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uneven expert_indices [T,K], routing weights [T,K] with many equal values, and a padding mask [T]."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(T, E, generator=generator) + torch.arange(E)
    weights, indices = scores.softmax(-1).topk(K)
    return (weights * 8).round() / 8, indices, torch.rand(T, generator=generator) < 0.8


def slow_capacity(weights: Tensor, indices: Tensor, factor: float, mask: Tensor | None) -> Tensor:
    kept = torch.full_like(indices, E)
    capacity = math.ceil(factor * T * K / E)
    for expert in range(E):
        slots = [(t, k) for t in range(T) for k in range(K) if indices[t, k] == expert]
        order = {slot: -float(weights[slot]) for slot in slots}
        if mask is not None:
            order = {(t, k): weight if mask[t] else 1.0 for (t, k), weight in order.items()}
        for slot in sorted(slots, key=lambda slot: (order[slot], slot))[:capacity]:
            kept[slot] = expert
    return kept


@pytest.mark.parametrize("factor", [0.01, 0.5, 1.0, 1.25, 6.0])
@pytest.mark.parametrize("padded", [False, True])
def test_capacity(factor: float, padded: bool) -> None:
    for seed in range(5):
        weights, indices, mask = routed(seed)
        given = mask if padded else None
        kept = within_capacity(weights, indices, E, factor, given)
        assert torch.equal(kept, slow_capacity(weights, indices, factor, given))
        assert torch.equal(kept, indices) == (factor == 6.0)


@pytest.mark.parametrize("backend", ["loop", "grouped", "reference"])
def test_dropped_slots_add_nothing(moe_config: ModelConfig, backend: str) -> None:
    """A block gives the output and gradients of all experts on all tokens, dropped slots having weight 0."""
    config = replace(moe_config, num_experts=E, num_experts_per_tok=K)
    torch.manual_seed(0)
    block = MoEBlock(config, backend)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden = torch.randn(2, T // 2, config.hidden_size, requires_grad=True)
    routing = TrainingRouting(0.0, 0.6, [])
    y, _ = block(hidden, RoutingInputs(training=routing))

    x = hidden.flatten(0, 1)
    weights, indices, _ = block.gate(x)
    kept = slow_capacity(weights.detach(), indices, 0.6, None)
    expected = torch.zeros_like(x)
    for expert in range(E):
        (gate, up), down = block.experts.gate_up_proj[expert].chunk(2), block.experts.down_proj[expert]
        weight = (weights * (kept == expert)).sum(-1, keepdim=True)
        expected = expected + weight * F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    assert ((kept == E).sum(1) == K).any()  # some tokens lose all their slots
    leaves = [hidden, *block.parameters()]
    direction = torch.randn_like(y)
    ours = torch.autograd.grad((y * direction).sum(), leaves)
    slow = torch.autograd.grad((expected.view_as(y) * direction).sum(), leaves)
    torch.testing.assert_close(y, expected.view_as(y), rtol=1e-5, atol=1e-5)
    for mine, other in zip(ours, slow, strict=True):
        assert (mine - other).abs().max() < 1e-5 * other.abs().max()
    routed, received = block.dispatcher.slots_routed, block.dispatcher.slots_received
    assert (routed, received) == (T * K, int((kept < E).sum()))


def test_jitter_is_a_function_of_the_row() -> None:
    hidden = torch.randn(3, 50, 16)
    factors = jittered(hidden, 0.1, ["a", "b", "a"]) / hidden
    assert factors.min() >= 0.9 - 1e-5
    assert factors.max() <= 1.1 + 1e-5
    assert abs(factors.mean() - 1) < 0.01
    assert factors.std() == pytest.approx(0.1 / math.sqrt(3), rel=0.05)
    alone = jittered(hidden[2:], 0.1, ["a"]) / hidden[2:]
    assert torch.equal(factors[2], alone[0])
    torch.testing.assert_close(factors[0], factors[2])
    assert not torch.allclose(factors[0], factors[1])


@pytest.mark.parametrize("recompute", ["experts", "local", "full"])
@pytest.mark.parametrize("capacity_factor", [None, 0.7])
def test_recompute_draws_the_same_and_layers_differ(
    moe_config: ModelConfig, build: Callable, pack: Callable, recompute: str, capacity_factor: float | None
) -> None:
    batch = pack([[3, 5], [6, 2]])
    labels = batch["input_ids"].roll(-1, dims=1)
    routing = TrainingRouting(0.3, capacity_factor, ["1:7", "1:8"])
    config = replace(moe_config, num_nextn_predict_layers=1)

    def gradients(model: CausalLM) -> list[Tensor]:
        output = model(**batch, labels=labels, routing=routing)
        loss = output.cross_entropy_sum + output.mtp_cross_entropy_sum + output.router.z_sums.sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    for mine, other in zip(
        gradients(build(config, recompute=recompute)), gradients(build(config)), strict=True
    ):
        assert torch.equal(mine, other)
    model = build(config)
    seen = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    inputs: list[Tensor] = []
    for gate in seen:
        gate.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    plain = model(**batch)
    drawn = model(**batch, routing=routing)
    assert torch.equal(plain.logits, model(**batch, routing=None).logits)
    assert not torch.allclose(plain.logits, drawn.logits)
    first = inputs[2] / inputs[0]
    assert not torch.allclose(first, inputs[3] / inputs[1])
    assert (first - 1).abs().max() <= 0.3 + 1e-4
