"""Load the model of a folder, for commands such as evaluate and generate, which start no engine."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.config import ConfigError, ModelConfig
from moe.dispatch import DeduplicatedAllToAllDispatcher
from moe.hf import load_hf, stored_dtype
from moe.model import CausalLM
from moe.parallelize import apply_expert_parallel
from trainer.checkpoints.folder import reading
from trainer.engine.backends import choose_backends
from trainer.ranks.runtime import Ranks
from trainer.settings.run_folder import read_run, run_of


def ranks_for(source: Path) -> Ranks:
    """The ranks of a command that loads the model of `source`: on CUDA if usable, unless the run has
    device=cpu."""
    run_dir = run_of(source)
    ruled_out = (run_dir / "config.yaml").is_file() and read_run(run_dir).get("device") == "cpu"
    ranks = Ranks.of_command("cpu" if ruled_out else "auto")
    if ranks.warning and ranks.is_main:
        print(f"warning: {ranks.warning}", file=sys.stderr)
    return ranks


def load_model(folder: Path, ranks: Ranks, dtype: torch.dtype | None = None) -> CausalLM:
    """The model of a Hugging Face folder, in `dtype` or the folder's; every rank has its own experts.

    Raises ConfigError if the folder has no model, or has experts that the ranks cannot share evenly.
    """
    config, dtype = ModelConfig.of_folder(folder), dtype or stored_dtype(folder)
    backend = choose_backends(config, "auto", ranks.device, dtype).names.get("experts", "loop")
    with torch.device("meta"):
        model = CausalLM(config, backend=backend).to(dtype)
    shares = config.num_experts > 0 and ranks.world_size > 1
    if shares and config.num_experts % ranks.world_size:
        what = f"{ranks.world_size} ranks cannot share the {config.num_experts} experts of {folder} evenly"
        raise ConfigError([f"{what}; use a number of ranks that divides {config.num_experts}"])
    if shares:
        place = {"ep_rank": ranks.rank, "ep_size": ranks.world_size}
        apply_expert_parallel(model, **place, dispatcher=DeduplicatedAllToAllDispatcher(None))
    model.to_empty(device=ranks.device)
    with reading(folder):
        load_hf(model, folder, ep_rank=ranks.rank if shares else 0)
    return model.eval()


def selection_bias(folder: Path, device: torch.device) -> Tensor | None:
    """[L,E] selection bias stored in the checkpoint of this `hf` folder; None if the run has none."""
    balance = folder.parent / "balance.pt"
    if not balance.is_file():
        return None
    stored = read_tensors(balance, device)
    return stored.get("bias") if isinstance(stored, dict) else None


def read_tensors(path: Path, device: torch.device | str = "cpu") -> Any:
    """What torch.save wrote, of tensors and plain values only. Raises ConfigError for any other file."""
    try:
        return torch.load(path, weights_only=True, map_location=device)
    except Exception as error:  # torch raises exceptions of many types
        why = str(error).partition("\n")[0]
        what = f"{path} is not a file of tensors ({type(error).__name__}: {why})"
        raise ConfigError(f"{what}; it is not read, for it might run code: restore the checkpoint") from error
