"""The weights that a run starts from, when the run that writes them goes on."""

from pathlib import Path

from harness import run_ranks
from layouts import SmallRun, small_config

import trainer.train
from moe.hf import save_hf
from moe.init import init_weights
from moe.model import CausalLM
from trainer.parallel import ParallelPlan
from trainer.train import build_model


def first_weight(folder: str) -> float:
    """Each rank finds another newest checkpoint."""
    config = small_config(f"stage.init_from={folder}", "parallel.ep_size=2")
    ranks = SmallRun("parallel.ep_size=2").ranks
    trainer.train.hf_folder = lambda source: source / str(ranks.rank)
    model = build_model(config, ParallelPlan.of(config, 2), ranks)
    return float(next(model.parameters()).flatten()[0])


def test_all_ranks_start_from_the_same_checkpoint(tmp_path: Path):
    for rank in range(2):
        model = CausalLM(small_config().model)
        init_weights(model, seed=rank)
        (tmp_path / str(rank)).mkdir()
        save_hf(model, tmp_path / str(rank))
    first, second = run_ranks(first_weight, 2, str(tmp_path))
    assert first == second
