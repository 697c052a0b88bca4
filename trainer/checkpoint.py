"""Checkpoints: whole or invisible.

A checkpoint is written under a temporary name that carries the attempt, flushed to disk and renamed last;
`latest` is replaced atomically. Besides DeepSpeed's state it holds the weights as a Hugging Face folder
(`hf/`), each expert slice written by the rank that holds it.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.manifest import sync_folder, write_atomically
from data_pipeline.tokenizer import load_tokenizer
from moe.balance import Balance
from moe.config import ConfigError
from moe.hf import finish_folder, write_shards
from trainer.config import RunConfig
from trainer.engine import DTYPES, Engine
from trainer.parallel import ParallelPlan
from trainer.runtime import Ranks, random_state, set_random_state


@dataclass(frozen=True)
class Progress:
    """How far a run is: all that the loop needs besides weights and optimizer."""

    step: int  # optimizer steps done
    next_row: int  # first row of the data that has not been trained on


class Checkpoints:
    """The `checkpoints/` of one run folder."""

    def __init__(
        self, run_dir: Path, attempt: int, config: RunConfig, plan: ParallelPlan, ranks: Ranks
    ) -> None:
        self._folder = run_dir / "checkpoints"
        self._latest = run_dir / "latest"
        self._attempt = attempt
        self._config = config
        self._ranks = ranks
        self._ep_rank = plan.ep_rank(ranks.rank)
        self._layout = {
            "world_size": plan.world_size,
            "ep_size": plan.ep_size,
            "zero_stage": config.zero_stage,
        }

    def save(self, engine: Engine, balance: Balance, progress: Progress) -> Path:
        """Write the checkpoint of `progress`; every rank must call it. Returns its folder."""
        final = self._folder / f"step-{progress.step:08d}"
        partial = self._folder / f".step-{progress.step:08d}.attempt-{self._attempt}"
        if self._ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "hf").mkdir(parents=True)
        self._ranks.barrier()
        engine.save(partial / "deepspeed")
        torch.save(random_state(), partial / f"random-{self._ranks.rank}.pt")
        written = write_shards(
            engine.owned_parameters(), partial / "hf", rank=self._ranks.rank, ep_rank=self._ep_rank
        )
        everywhere: list = [None] * self._ranks.world_size
        dist.all_gather_object(everywhere, written)
        if self._ranks.is_main:
            merged = {name: place for part in everywhere for name, place in part.items()}
            finish_folder(self._config.model, DTYPES[self._config.dtype], merged, partial / "hf")
            shutil.copyfile(Path(self._config.data.dir) / "tokenizer.json", partial / "hf" / "tokenizer.json")
            torch.save(balance.state(), partial / "balance.pt")
            record = {"progress": asdict(progress), "layout": self._layout, "attempt": self._attempt}
            (partial / "trainer.json").write_text(json.dumps(record, indent=1))
            _sync_tree(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            sync_folder(self._folder)
            write_atomically(self._latest, f"{final.name}\n".encode())
            self._prune()
        self._ranks.barrier()
        return final

    def load_latest(self, engine: Engine, balance: Balance) -> Progress | None:
        """Restore the newest checkpoint into `engine`; None where there is none. Every rank must call it.

        Raises ConfigError if it was written on another layout of ranks.
        """
        folder = latest_checkpoint(self._folder.parent)
        if folder is None:
            return None
        record = json.loads((folder / "trainer.json").read_text())
        differing = [
            f"{key}: checkpoint {record['layout'][key]}, run {value}"
            for key, value in self._layout.items()
            if record["layout"][key] != value
        ]
        if differing:
            raise ConfigError(
                [f"{folder} was written on another layout ({'; '.join(differing)}); use the same"]
            )
        engine.load(folder / "deepspeed")
        balance.load_state(torch.load(folder / "balance.pt", weights_only=True, map_location="cpu"))
        set_random_state(torch.load(folder / f"random-{self._ranks.rank}.pt", weights_only=True))
        return Progress(**record["progress"])

    def _prune(self) -> None:
        for old in sorted(self._folder.glob("step-*"))[: -self._config.checkpoint.keep]:
            shutil.rmtree(old)
        for leftover in self._folder.glob(".step-*"):
            shutil.rmtree(leftover)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run folder."""
    pointer = run_dir / "latest"
    if not pointer.is_file():
        return None
    return run_dir / "checkpoints" / pointer.read_text().strip()


def hf_folder(source: Path) -> Path:
    """The Hugging Face folder in a run folder (its newest checkpoint), in a checkpoint, or the folder itself.

    Raises ConfigError for a run that has no checkpoint yet.
    """
    if (source / "config.yaml").is_file():
        newest = latest_checkpoint(source)
        if newest is None:
            raise ConfigError([f"{source} has no checkpoint yet; train it first"])
        source = newest
    return source / "hf" if (source / "hf").is_dir() else source


def check_tokenizer(weights: Path, data_dir: Path) -> None:
    """Raises ConfigError if the tokenizer that lies beside the weights is not that of the data."""
    if not (weights / "tokenizer.json").is_file():
        return
    if load_tokenizer(weights).vocabulary() != load_tokenizer(data_dir).vocabulary():
        raise ConfigError(
            [
                f"stage.init_from: {weights} was trained with another tokenizer than data.dir={data_dir};"
                f" prepare the data with data.tokenizer={weights}"
            ]
        )


def _sync_tree(folder: Path) -> None:
    """Wait until everything in the folder is on the disk."""
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
