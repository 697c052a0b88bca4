"""Each rank keeps its share of the experts, in order, on real devices and on meta."""

from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from torch import nn

from moe.block import MoEBlock
from moe.config import ModelConfig
from moe.dispatch import LocalDispatcher
from moe.model import CausalLM
from moe.parallelize import apply_expert_parallel

E, H, INTERMEDIATE = 8, 16, 4


class Model(nn.Module):
    """Two blocks with a dense layer between them."""

    def __init__(self) -> None:
        super().__init__()
        config = SimpleNamespace(  # the keys of ModelConfig that a block reads
            hidden_size=H,
            num_experts=E,
            num_experts_per_tok=2,
            moe_intermediate_size=INTERMEDIATE,
            norm_topk_prob=True,
            shared_expert_intermediate_size=0,
            shared_expert_gate=False,
        )
        self.layers = nn.ModuleList([MoEBlock(config, "loop"), nn.Linear(H, H), MoEBlock(config, "loop")])


@pytest.mark.parametrize("ep_size", [1, 2, 4, 8])
def test_shares_in_order_are_the_whole(ep_size: int) -> None:
    torch.manual_seed(0)
    whole = Model()
    for weight in whole.parameters():
        nn.init.normal_(weight)
    state = whole.state_dict()
    shares = []
    for rank in range(ep_size):
        model, dispatcher = Model(), LocalDispatcher()
        model.load_state_dict(state)
        apply_expert_parallel(model, ep_rank=rank, ep_size=ep_size, dispatcher=dispatcher)
        for block in (model.layers[0], model.layers[2]):
            assert block.dispatcher is dispatcher
            assert block.experts.num_local_experts == len(block.experts.down_proj) == E // ep_size
            assert all(w.untyped_storage().nbytes() == 4 * w.numel() for w in block.experts.parameters())
        shares.append(model.state_dict())
    assert list(shares[0]) == list(state)
    for name, weight in state.items():
        if ".experts." in name:
            assert torch.equal(torch.cat([share[name] for share in shares]), weight)
        else:
            assert all(torch.equal(share[name], weight) for share in shares)


def test_meta() -> None:
    with torch.device("meta"):
        model = Model()
    apply_expert_parallel(model, ep_rank=1, ep_size=4, dispatcher=LocalDispatcher())
    experts = model.layers[2].experts
    assert experts.gate_up_proj.shape == (2, 2 * INTERMEDIATE, H)
    assert experts.down_proj.shape == (2, H, INTERMEDIATE)
    assert all(weight.is_meta and weight.requires_grad for weight in model.parameters())
    assert isinstance(experts.down_proj, nn.Parameter)


def test_wrong_layouts_are_our_bugs() -> None:
    with pytest.raises(AssertionError, match="ep_size=3 does not divide num_experts=8"):
        apply_expert_parallel(Model(), ep_rank=0, ep_size=3, dispatcher=LocalDispatcher())
    model = Model()
    apply_expert_parallel(model, ep_rank=0, ep_size=2, dispatcher=LocalDispatcher())
    with pytest.raises(AssertionError, match="already distributed"):
        apply_expert_parallel(model, ep_rank=0, ep_size=2, dispatcher=LocalDispatcher())


def test_235b_fits_on_256_ranks_of_80_gib():
    """No rank builds the whole model: on meta, each rank of ep_size 128 holds one expert per layer."""
    with initialize_config_module("conf", version_base="1.3"):
        values = OmegaConf.to_container(compose("train", overrides=["model=qwen3_235b_a22b", "name=t"]).model)
    config = ModelConfig(**values)
    world_size, ep_size = 256, 128
    with torch.device("meta"):
        model = CausalLM(config, backend="grouped")
    apply_expert_parallel(model, ep_rank=77, ep_size=ep_size, dispatcher=LocalDispatcher())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    shared = sum(p.numel() for p in model.parameters()) - experts
    assert experts * ep_size + shared == 235_093_634_560
    assert experts == 94 * 3 * 1536 * 4096
    weights = 2 * (experts + shared)  # bf16, not partitioned under ZeRO 0 and 1
    gradients = 4 * (experts + shared)  # fp32 sums
    # fp32 masters and two moments, partitioned over the ranks with the same parameter
    optimizer = 12 * (experts / (world_size / ep_size) + shared / world_size)
    assert (weights + gradients + optimizer) / 2**30 < 65
