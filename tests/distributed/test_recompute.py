"""What each kind of recompute sends again and keeps, counted on two ranks: the results are equal."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from layouts import micro_batches, small_config
from torch import Tensor

from moe.init import init_weights
from moe.model import CausalLM
from moe.parallelize import apply_expert_parallel
from moe.recompute import RECOMPUTE
from trainer.checkpoints.assemble import DISPATCHERS

SHARED = ["model=tiny_qwen2_moe", "model.shared_expert_intermediate_size=24"]
MODELS: dict[str, list[str]] = {
    "experts": [],
    "dense layer, shared experts": [*SHARED, "model.num_hidden_layers=3", "model.mlp_only_layers=[1]"],
}
LAYERS = 2  # sparse layers of each
SETTINGS = [*product(["experts"], DISPATCHERS, (1, 2), ["loop"])]
SETTINGS += [
    ("dense layer, shared experts", "deduplicated", 1, "loop"),
    ("experts", "all_to_all", 1, "reference"),
]


# forward, backward: collectives; bytes_sent; kept: bytes for the backward; values: loss and gradients
Found = dict[str, Any]


def forward_and_backward(recompute: str, model: str, kind: str, chunks: int, backend: str) -> Found:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    collectives = 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal collectives
        collectives += 1
        return dist.all_to_all_single(*args, **kwargs)

    config = small_config("micro_batch_size=8", *MODELS[model])
    with torch.device("meta"):
        lm = CausalLM(config.model, backend=backend, recompute=recompute)
    dispatcher = DISPATCHERS[kind](dist.group.WORLD, counting, chunks)
    apply_expert_parallel(lm, ep_rank=rank, ep_size=world_size, dispatcher=dispatcher)
    lm.to_empty(device="cpu")
    init_weights(lm, config.seed, ep_rank=rank)
    weights = {weight.untyped_storage().data_ptr() for weight in lm.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    (batch,) = micro_batches(config.plan(world_size), rank, 0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = lm(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.token_mask, batch.labels)
    assert output.router is not None
    loss = output.cross_entropy_sum + output.router.probability_sums.square().sum()
    forward, sent = collectives, dispatcher.bytes_sent
    loss.backward()
    values = {"loss": loss.detach(), **{name: weight.grad for name, weight in lm.named_parameters()}}
    counts = {"forward": forward, "backward": collectives - forward, "bytes_sent": sent}
    return {**counts, "kept": sum(kept.values()), "values": values}


def every_kind(settings: list[tuple[str, str, int, str]]) -> list[dict[str, Found]]:
    return [{kind: forward_and_backward(kind, *one) for kind in RECOMPUTE} for one in settings]


@pytest.fixture(scope="module")
def ranks() -> list[list[dict[str, Found]]]:
    return run_ranks(every_kind, 2, SETTINGS)


@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=map(str, SETTINGS))
def test_only_full_recompute_sends_again(ranks: list[list[dict[str, Found]]], number: int) -> None:
    """Per layer, forward: counts, and for each chunk packed tokens and results. Backward: their gradients."""
    chunks = SETTINGS[number][2]
    for rank in ranks:
        for kind, found in rank[number].items():
            again = LAYERS * (1 + 2 * chunks)
            assert found["forward"] == again
            assert found["backward"] == LAYERS * 2 * chunks + (again if kind == "full" else 0), kind
            assert found["bytes_sent"] == rank[number]["none"]["bytes_sent"] > 0


@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=map(str, SETTINGS))
def test_equal_results_and_less_kept(ranks: list[list[dict[str, Found]]], number: int) -> None:
    for rank in ranks:
        none = rank[number]["none"]
        for kind, found in rank[number].items():
            for name, value in none["values"].items():
                scale = value.abs().max().item()
                torch.testing.assert_close(
                    found["values"][name], value, rtol=0, atol=1e-6 * scale, msg=f"{kind}: {name}"
                )
        kept = [rank[number][kind]["kept"] for kind in ("none", "experts", "local", "full")]
        assert kept == sorted(set(kept), reverse=True), kept
