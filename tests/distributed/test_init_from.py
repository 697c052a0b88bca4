"""The weights that a run starts from: the same on all ranks, also while another run writes newer ones."""

from pathlib import Path

import torch
import torch.distributed as dist
from harness import run_ranks
from layouts import DENSE, FAMILY, SmallRun, small_config

import trainer.checkpoints.assemble
from moe.hf import save_hf
from moe.init import init_weights
from moe.model import CausalLM
from trainer.checkpoints.assemble import build_model
from trainer.engine.engine import init_deepspeed
from trainer.ranks.runtime import Ranks


def first_weight(folder: str) -> float:
    """The first weight of the model when each rank finds a different newest checkpoint."""
    config = small_config(f"stage.init_from={folder}", "parallel.ep_size=2")
    ranks = SmallRun("parallel.ep_size=2").ranks
    trainer.checkpoints.assemble.hf_folder = lambda source: source / str(ranks.rank)
    model = build_model(config, config.plan(2), ranks)
    return float(next(model.parameters()).flatten()[0])


def test_all_ranks_start_from_the_same_checkpoint(tmp_path: Path):
    for rank in range(2):
        model = CausalLM(small_config().model)
        init_weights(model, seed=rank)
        (tmp_path / str(rank)).mkdir()
        save_hf(model, tmp_path / str(rank))
    first, second = run_ranks(first_weight, 2, str(tmp_path))
    assert first == second


def built(*overrides: str) -> tuple[list[torch.Tensor], set[torch.dtype]]:
    """The parameters that a rank starts with, and the dtypes of the memory that it allocated for them."""
    init_deepspeed(torch.device("cpu"))
    taken: set[torch.dtype] = set()
    to_empty = CausalLM.to_empty

    def recording(model: CausalLM, **keywords: object) -> CausalLM:
        taken.update(parameter.dtype for parameter in model.parameters())
        return to_empty(model, **keywords)

    CausalLM.to_empty = recording
    config = small_config(*overrides)
    ranks = Ranks(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    model = build_model(config, config.plan(ranks.world_size), ranks)
    CausalLM.to_empty = to_empty
    return list(model.parameters()), taken


def same_in_bf16(dense: str) -> list[tuple[bool, set[torch.dtype]]]:
    """For each source of weights: whether bf16 weights are the rounded fp32 ones; the dtypes allocated."""
    upcycle = ["model.moe_intermediate_size=16", "model.num_experts_per_tok=4"]
    upcycle += ["init.upcycle=split", "init.upcycle_noise=0.1"]
    ways = [
        ["parallel.ep_size=2"],
        FAMILY["qwen3_next"],
        ["model=tiny_dense", *DENSE, "model.intermediate_size=32", f"stage.init_from={dense}"],
        [*upcycle, "parallel.ep_size=2", f"stage.init_from={dense}"],
    ]
    found = []
    for way in ways:
        (exact, _), (rounded, taken) = (built(*way, f"dtype={dtype}") for dtype in ("fp32", "bf16"))
        pairs = zip(rounded, exact, strict=True)
        found.append((all(torch.equal(ours, oracle.bfloat16()) for ours, oracle in pairs), taken))
    return found


def test_a_model_takes_the_memory_of_its_dtype_and_the_values_of_fp32(tmp_path: Path):
    model = CausalLM(small_config("model=tiny_dense", *DENSE, "model.intermediate_size=32").model)
    init_weights(model, seed=3)
    save_hf(model, tmp_path)
    for found in run_ranks(same_in_bf16, 2, str(tmp_path)):
        *others, upcycled = found
        assert others == [(True, {torch.bfloat16})] * 3
        assert upcycled == (True, {torch.float32}), "upcycling computes in fp32 before it rounds"
