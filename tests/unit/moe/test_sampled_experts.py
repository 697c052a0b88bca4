"""The experts that sampling chose, on the training side: compared with the router's choice, or used again."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.model import CausalLM
from moe.router import Router, SampledExperts

Build = Callable[..., CausalLM]
Pack = Callable[[list[list[int]]], dict[str, Tensor]]
H, E, K, T = 16, 8, 2, 9


@pytest.fixture
def router() -> Router:
    router = Router(H, E, K, norm_topk_prob=True)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    return router


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(T, H, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("replay", [True, False])
def test_the_routers_own_choice_changes_nothing(router: Router, hidden: Tensor, replay: bool) -> None:
    bias = torch.linspace(0, 0.3, E)
    weights, experts, expected = router(hidden, None, bias)
    assert expected.mismatches is None
    again = router(hidden, None, bias, SampledExperts(experts, replay))
    assert torch.equal(again[0], weights)
    assert torch.equal(again[1], experts)
    assert again[2].mismatches == 0
    for value, other in zip(again[2][:5], expected[:5], strict=True):
        assert torch.equal(value, other)


def test_mismatches_are_the_tokens_with_other_experts(router: Router, hidden: Tensor) -> None:
    """In any order; not those outside the mask, nor those whose choice is not known."""
    _, experts, _ = router(hidden)
    changed = experts.flip(-1).to(torch.int16)
    mask = torch.ones(T, dtype=torch.bool)
    mask[0] = False
    for token in (0, 3, 4, 8):  # one other expert, of which 0 is outside the mask
        changed[token, token % 2] = next(e for e in range(E) if e not in experts[token])
    changed[3] = -1
    for replay in (True, False):
        _, used, statistics = router(hidden, mask, None, SampledExperts(changed, replay))
        assert statistics.mismatches == (0 if replay else 2)  # 4 and 8
        expected = torch.where((changed < 0) | (not replay), experts, changed.long())
        assert torch.equal(used.sort().values, expected.sort().values)
    assert router(hidden, None, None, SampledExperts(changed, False))[2].mismatches == 3


@pytest.mark.parametrize("normalize", [True, False])
def test_replayed_weights_are_the_softmax_at_the_sampled_experts(hidden: Tensor, normalize: bool) -> None:
    router = Router(H, E, K, norm_topk_prob=normalize)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(2)
    sampled = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    direction = torch.randn(T, K, generator=generator)
    weights, experts, statistics = router(hidden, None, None, SampledExperts(sampled, True))
    gradient = torch.autograd.grad((weights * direction).sum(), router.weight)[0]
    expected = (hidden @ router.weight.T).softmax(-1).gather(1, sampled)
    expected = expected / expected.sum(-1, keepdim=True) if normalize else expected
    assert torch.equal(experts, sampled)
    assert statistics.tokens_per_expert.tolist() == torch.bincount(sampled.flatten(), minlength=E).tolist()
    torch.testing.assert_close(weights, expected)
    other = torch.autograd.grad((expected * direction).sum(), router.weight)[0]
    torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recompute", ["none", "experts", "local", "full"])
def test_a_model_replays_under_recompute(
    moe_config: ModelConfig, build: Build, pack: Pack, recompute: str
) -> None:
    """The experts of another model's routers; also in the forward that only counts; gradients are equal."""
    batch = pack([[3, 5], [6, 2]])
    labels = batch["input_ids"].roll(-1, dims=1)
    plain = build(moe_config)
    sampler = build(moe_config)
    with torch.no_grad():
        for parameter in sampler.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
        own, others = (m(**batch, keep_experts=True).router.expert_indices for m in (plain, sampler))
    assert own.shape == (2, 16, 2)  # [L, T, K]
    differ = (own.sort(-1).values != others.sort(-1).values).any(-1).sum(-1)
    assert differ.min() > 0
    sampled = SampledExperts(others.transpose(0, 1), replay=True)
    measured = plain(**batch, sampled=replace(sampled, replay=False), keep_experts=True).router
    assert torch.equal(measured.expert_indices, own)
    assert torch.equal(measured.mismatches, differ.float())

    def results(model: CausalLM) -> tuple[Tensor, ...]:
        output = model(**batch, labels=labels, sampled=sampled, keep_experts=True)
        assert torch.equal(output.router.expert_indices, others)
        counted = model(**batch, sampled=sampled, routing_only=True).router
        assert torch.equal(counted.tokens_per_expert, output.router.tokens_per_expert)
        assert torch.equal(counted.mismatches, output.router.mismatches)
        loss = output.cross_entropy_sum
        return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))

    model = build(moe_config, recompute=recompute)
    for value, expected in zip(results(model), results(plain), strict=True):
        assert torch.equal(value, expected)


def test_multi_token_prediction_has_no_sampled_experts(
    moe_config: ModelConfig, build: Build, pack: Pack
) -> None:
    batch = pack([[8]])
    model = build(replace(moe_config, num_nextn_predict_layers=1)).train()
    own = model(**batch, keep_experts=True).router.expert_indices
    assert len(own) == 3
    experts = own[:2].roll(1, dims=1).transpose(0, 1)
    for replay in (True, False):
        sampled = SampledExperts(experts, replay)
        output = model(**batch, labels=batch["input_ids"], sampled=sampled, keep_experts=True)
        assert torch.equal(output.router.expert_indices[:2], experts.transpose(0, 1)) == replay
        assert output.router.mismatches[2] == 0
        assert (output.router.mismatches[:2].min() > 0) != replay


def test_nothing_is_kept_that_nobody_asks_for(moe_config: ModelConfig, build: Build, pack: Pack) -> None:
    router = build(moe_config)(**pack([[8]])).router
    assert router.expert_indices is None
    assert router.mismatches is None
