"""Initial values: the same for every layout, drawn from the right distribution."""

from dataclasses import replace

import pytest
import torch

from moe.config import ModelConfig
from moe.dispatch import LocalDispatcher
from moe.hf import hub_tensors
from moe.init import init_weights
from moe.model import CausalLM
from moe.parallelize import apply_expert_parallel


@pytest.mark.parametrize("ep_size", [2, 8])
def test_values_do_not_depend_on_ep_size(moe_config: ModelConfig, ep_size: int) -> None:
    whole = CausalLM(moe_config)
    init_weights(whole, seed=3)
    expected = dict(hub_tensors(whole))
    seen = set()
    for ep_rank in range(ep_size):
        with torch.device("meta"):
            part = CausalLM(moe_config)
        apply_expert_parallel(part, ep_rank=ep_rank, ep_size=ep_size, dispatcher=LocalDispatcher())
        part.to_empty(device="cpu")
        init_weights(part, seed=3, ep_rank=ep_rank)
        for name, tensor in hub_tensors(part, ep_rank):
            assert torch.equal(tensor, expected[name]), name
            seen.add(name)
    assert seen == expected.keys()


def test_distribution(config: ModelConfig) -> None:
    config.initializer_range = 0.02
    model = CausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    init_weights(model, seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            identity = 0 if config.zero_centered_norm and "linear_attn" not in name else 1
            assert (parameter == identity).all(), name
        elif name.endswith("dt_bias"):
            assert (parameter == 1).all(), name
        elif name.endswith("A_log"):
            assert ((parameter.exp() > 0.01) & (parameter.exp() < 16)).all(), name
            assert parameter.unique().numel() == parameter.numel(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            spread = 6 / parameter.numel() ** 0.5  # six standard errors and more
            assert parameter.std().item() == pytest.approx(0.02, rel=spread), name
            assert abs(parameter.mean().item()) < 0.02 * spread, name


def test_routers_have_their_own_scale(next_config: ModelConfig) -> None:
    """Nothing else is scaled; the norms of multi-token prediction start as the identity, like all norms."""
    config = replace(next_config, num_nextn_predict_layers=1)
    plain, scaled = CausalLM(config), CausalLM(config)
    init_weights(plain, seed=0)
    init_weights(scaled, seed=0, router_scale=0.1)
    for (name, mine), other in zip(scaled.named_parameters(), plain.parameters(), strict=True):
        router = name.endswith("mlp.gate.weight")
        torch.testing.assert_close(mine, 0.1 * other if router else other, rtol=1e-6, atol=0)
        if name.startswith("mtp.") and "norm" in name:
            assert not mine.any(), name


def test_every_tensor_has_its_own_values(moe_config: ModelConfig) -> None:
    model = CausalLM(moe_config)
    init_weights(model, seed=0)
    first = {name: tensor.flatten()[:24].tolist() for name, tensor in hub_tensors(model) if tensor.dim() == 2}
    assert len({tuple(values) for values in first.values()}) == len(first)


def test_seed_decides(config: ModelConfig) -> None:
    models = [CausalLM(config) for _ in range(3)]
    for model, seed in zip(models, [0, 0, 1], strict=True):
        init_weights(model, seed)
    weights = [model.model.embed_tokens.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_bf16_is_the_rounded_fp32(config: ModelConfig) -> None:
    precise, rounded = CausalLM(config), CausalLM(config).bfloat16()
    for model in (precise, rounded):
        init_weights(model, seed=0)
    for ours, oracle in zip(rounded.parameters(), precise.parameters(), strict=True):
        assert torch.equal(ours, oracle.bfloat16())
