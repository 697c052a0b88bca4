"""Load the whole model of a folder onto one device, for commands such as evaluate and generate."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.config import ConfigError, ModelConfig
from moe.hf import load_hf, stored_dtype
from moe.model import CausalLM
from trainer.checkpoints.folder import reading
from trainer.engine.backends import choose_backends
from trainer.ranks.device import choose_device
from trainer.settings.run_folder import read_run, run_of


def device_for(source: Path) -> torch.device:
    """The device for the model of `source` in a command: CUDA if usable, unless the run has device=cpu."""
    run_dir = run_of(source)
    ruled_out = (run_dir / "config.yaml").is_file() and read_run(run_dir).get("device") == "cpu"
    device, warning = choose_device("cpu" if ruled_out else "auto")
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    return device


def load_model(folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> CausalLM:
    """The model of a Hugging Face folder, in `dtype` or the folder's, whole on one device.

    Raises ConfigError if the folder has none.
    """
    config, dtype = ModelConfig.of_folder(folder), dtype or stored_dtype(folder)
    backend = choose_backends(config, "auto", device, dtype).names.get("experts", "loop")
    with torch.device("meta"):
        model = CausalLM(config, backend=backend).to(dtype)
    model.to_empty(device=device)
    with reading(folder):
        load_hf(model, folder)
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
