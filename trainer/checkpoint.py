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

from data_pipeline.manifest import Manifest, sync_folder, write_atomically
from data_pipeline.tokenizer import load_tokenizer
from moe.balance import Balance
from moe.config import ConfigError
from moe.hf import WriteError, finish_folder, write_shards
from trainer.config import RunConfig
from trainer.engine import DTYPES, Engine
from trainer.parallel import ParallelPlan
from trainer.run_folder import latest_checkpoint
from trainer.runtime import Ranks, TrainingError, random_state, set_random_state


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
        """Write the checkpoint of `progress`; every rank must call it. Returns its folder.

        Raises TrainingError where it cannot be written (a full disk); the checkpoints before it stay.
        """
        try:
            return self._save(engine, balance, progress)
        except (OSError, RuntimeError, WriteError) as error:
            free = shutil.disk_usage(self._latest.parent).free / 2**30
            raise TrainingError(
                f"cannot write the checkpoint of step {progress.step} into {self._folder} "
                f"({free:.1f} GiB free): {error}; the checkpoints before it are unharmed"
            ) from error

    def _save(self, engine: Engine, balance: Balance, progress: Progress) -> Path:
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
            data_dir = Path(self._config.data.dir)
            end_of_text = Manifest.load(data_dir).tokenizer.end_of_text
            dtype = DTYPES[self._config.dtype]
            finish_folder(self._config.model, dtype, merged, partial / "hf", end_of_text)
            shutil.copyfile(data_dir / "tokenizer.json", partial / "hf" / "tokenizer.json")
            torch.save(balance.state(), partial / "balance.pt")
            record = {"progress": asdict(progress), "layout": self._layout, "attempt": self._attempt}
            (partial / "trainer.json").write_text(json.dumps(record, indent=1))
            _sync_tree(partial)
            self._retire([path for path in self._whole() if path >= final])  # of a future that was undone
            partial.rename(final)
            sync_folder(self._folder)
            write_atomically(self._latest, f"{final.name}\n".encode())
            self._retire(self._whole()[: -self._config.checkpoint.keep])
        self._ranks.barrier()
        return final

    def load_latest(self, engine: Engine, balance: Balance) -> Progress | None:
        """Restore the newest checkpoint into `engine`; None where there is none. Every rank must call it.

        Raises ConfigError if it was written on another layout of ranks.
        """
        folder = latest_checkpoint(self._folder.parent)
        if folder is None:
            return None
        try:
            record = json.loads((folder / "trainer.json").read_text())
        except (OSError, ValueError) as error:
            there = ", ".join(path.name for path in self._whole()) or "none"
            raise ConfigError(
                [f"{self._latest} names {folder.name}, which cannot be read ({error}); whole ones: {there}"]
            ) from error
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

    def _whole(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"))

    def _retire(self, checkpoints: list[Path]) -> None:
        """Remove checkpoints, and what crashes left: hidden first, so that none is ever seen half gone."""
        for path in checkpoints:
            path.rename(path.with_name(f".{path.name}.retired"))
        for leftover in self._folder.glob(".step-*"):
            if not leftover.name.endswith(f"attempt-{self._attempt}"):
                shutil.rmtree(leftover)


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
