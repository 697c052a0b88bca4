"""Save checkpoints, in the background while training continues, and restore them on any layout of ranks.

The ranks write into a hidden folder named by step and attempt. When all have written, rank 0 adds the
manifest, renames the folder and replaces `latest`: only complete checkpoints are visible. See also folder.py.
"""

import gc
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.config import read_template
from data_pipeline.manifest import sync, write_atomically
from data_pipeline.tokenizer import tokenizer_of
from moe.balance import Balance
from moe.config import ConfigError
from moe.hf import Written, write_config, write_index, write_shards
from trainer.checkpoints.folder import damage, is_read, measure, reading
from trainer.checkpoints.optimizer_state import fill_fragments, write_fragments
from trainer.checkpoints.weights import read_tensors
from trainer.engine.engine import Engine, Fragment
from trainer.monitor.hardware import available_memory
from trainer.ranks.runtime import DTYPES, Ranks, TrainingError, random_state, set_random_state
from trainer.settings.config import RunConfig
from trainer.settings.parallel import ParallelPlan
from trainer.settings.run_folder import NAMES, checkpoints, read_manifest, read_state, write_manifest

T = TypeVar("T")


class Part(NamedTuple):
    """The part of a checkpoint that one rank has written."""

    weights: dict[str, Written]  # by hub name
    elements: int  # number of elements of optimizer state
    files: dict[str, list[int]]  # path -> `measure` of the file


class Writing(NamedTuple):
    """A checkpoint that is not committed yet."""

    step: int
    folder: Path
    fields: int  # of each fragment of optimizer state
    part: "Future[Part]"  # of this rank


class Checkpoints:
    """The `checkpoints/` of one run folder. Every rank must call every method without an underscore."""

    def __init__(
        self,
        run_dir: Path,
        attempt: int,
        config: RunConfig,
        plan: ParallelPlan,
        ranks: Ranks,
        say: Callable[[str], None],
    ) -> None:
        self._run_dir, self._folder = run_dir, run_dir / "checkpoints"
        self._attempt, self._config, self._ranks, self._say = attempt, config, ranks, say
        self._ep_rank = plan.ep_rank(ranks.rank)
        self._template = read_template(config.data.chat_template).encode()  # now, while the file is there
        self._layout: dict[str, Any] = {"world_size": plan.world_size, "ep_size": plan.ep_size}
        self._layout |= {"zero_stage": config.zero_stage, "dtype": config.dtype}
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Writing | None = None
        self._saved = 0  # the step last restored, or last saved (perhaps still being written)
        self._stall = 0.0
        self._told = False  # whether `_fits` has printed its message

    @property
    def written(self) -> bool:
        """Whether this rank has written its part of a checkpoint, so that `finish` would not wait for it."""
        return self._writing is not None and self._writing.part.done()

    def take_stall(self) -> float:
        """Seconds that training has waited for checkpoints since the last call."""
        stall, self._stall = self._stall, 0.0
        return stall

    def save(self, engine: Engine, balance: Balance, step: int, of_stage: dict[str, Any]) -> None:
        """Write a checkpoint of the state after `step`; with checkpoint.background, copy it and write later.

        `of_stage` is the stage's own state.

        Does nothing if this step has just been saved or restored.
        Raises TrainingError on all ranks if one cannot write (a full disk); earlier checkpoints stay.
        """
        if step == self._saved:
            return
        self.finish()
        self._saved, started = step, time.perf_counter()
        gc.collect()  # on all ranks at once
        folder = self._folder / f".step-{step:08d}.attempt-{self._attempt}"
        self._agree(f"write the checkpoint of step {step}", self._make, folder)
        generators = self._agree("read the random generators", random_state)
        state = {name: tensor.clone() for name, tensor in balance.state().items()}
        of_run = {"balance.pt": state, "random.pt": generators} | ({"stage.pt": of_stage} if of_stage else {})
        extras = of_run if self._ranks.is_main else {}
        weights = engine.owned_parameters()
        fragments = (fragment for fragment in engine.fragments() if fragment.owned)
        if self._config.checkpoint.background and self._fits(engine.fields):
            copies = [(name, _on_host(tensor)) for name, tensor in weights]
            states = [
                replace(fragment, state={field: _on_host(view) for field, view in fragment.state.items()})
                for fragment in fragments
            ]
            part = self._writer.submit(self._write, folder, copies, states, extras)
        else:
            part = Future()
            try:
                part.set_result(self._write(folder, weights, fragments, extras))
            except Exception as error:
                part.set_exception(error)
            for _ in weights:  # all ranks must gather, even one that could not write
                pass
        self._writing = Writing(step, folder, engine.fields, part)
        self._stall += time.perf_counter() - started
        if not self._config.checkpoint.background:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and commit it. Raises as `save` does."""
        if self._writing is None:
            return
        started, writing = time.perf_counter(), self._writing
        self._writing = None
        what = f"write the checkpoint of step {writing.step}"
        try:
            parts = self._agree(what, writing.part.result)
            self._agree(what, self._commit, writing, parts)
        except TrainingError:
            if self._ranks.is_main:
                shutil.rmtree(writing.folder, ignore_errors=True)
            raise
        self._stall += time.perf_counter() - started

    def close(self) -> None:
        """Wait until this rank has finished writing and removing files; commits nothing."""
        self._writer.shutdown()

    def load_latest(self, engine: Engine, balance: Balance) -> tuple[int, dict[str, Any]]:
        """Restore the newest whole checkpoint, saved on any layout of ranks.

        Returns its step, 0 without one, and the state of its stage.

        Raises ConfigError if all checkpoints are damaged: a run must not silently restart from step 0.
        """
        problems: list[str] = []
        for checkpoint in self._agree(f"list {self._folder}", checkpoints, self._run_dir)[0]:
            with reading(checkpoint):
                share = self._ranks.rank, self._ranks.world_size
                shares = self._agree(f"read {checkpoint}", damage, checkpoint, *share)
                found = dict.fromkeys(line for share in shares for line in share)
                if not found:
                    if problems:
                        headline = f"warning: going on from {checkpoint.name}, which is whole; damaged:"
                        self._say("\n  ".join([headline, *problems]))
                    return self._restore(checkpoint, engine, balance)
            problems += [f"{checkpoint.name}: {line}" for line in found]
        if problems:
            remedy = "repair one of them, or move them away to start from step 0"
            raise ConfigError([f"{self._folder} holds no whole checkpoint; {remedy}:", *problems])
        return 0, {}

    def _agree(self, what: str, work: Callable[..., T], *args: Any) -> list[T]:
        """Return what `work(*args)` returns on each rank; if it fails on one, all raise TrainingError."""
        result, problem = None, None
        try:
            result = work(*args)
        except Exception as error:
            logging.exception("cannot %s", what)
            problem = f"rank {self._ranks.rank}: {error}"
        everywhere: list[Any] = [None] * self._ranks.world_size
        dist.all_gather_object(everywhere, (result, problem))
        if problems := [problem for _, problem in everywhere if problem]:
            free = shutil.disk_usage(self._run_dir).free / 2**30
            raise TrainingError(
                f"cannot {what} ({'; '.join(problems)}); {self._run_dir} has {free:.1f} GiB free; "
                "the other checkpoints are unharmed"
            )
        return [result for result, _ in everywhere]

    def _make(self, folder: Path) -> None:
        if self._ranks.is_main:
            self._check_fence()
            self._sweep()
            shutil.rmtree(folder, ignore_errors=True)
            for name in ("hf", "optimizer"):
                (folder / name).mkdir(parents=True)

    def _check_fence(self) -> None:
        """Raise if a later attempt has started: ranks cut off for a time must not touch its files."""
        attempt = read_state(self._run_dir)["attempt"]
        if attempt > self._attempt:
            raise TrainingError(f"attempt {attempt} has taken over the run from attempt {self._attempt}")

    def _fits(self, fields: int) -> bool:
        """Whether copies of all that this host's ranks write fit into half of its available memory."""
        nbytes = self._config.model.num_parameters() * (4 * fields + DTYPES[self._config.dtype].itemsize)
        needed = nbytes * self._config.parallel.nproc_per_node / self._ranks.world_size
        available = available_memory()
        fits = 2 * needed <= available
        if not fits and not self._told:
            self._told = True
            self._say(
                f"training waits while checkpoints are written: a copy would take {needed / 2**30:.1f} "
                f"GiB, more than half of the {available / 2**30:.1f} GiB that this host has available"
            )
        return fits

    def _write(
        self,
        folder: Path,
        weights: Iterable[tuple[str, Tensor]],
        fragments: Iterable[Fragment],
        extras: dict[str, Any],
    ) -> Part:
        """Write this rank's files; they are on the disk when it returns."""
        rank = self._ranks.rank
        written = write_shards(weights, folder / "hf", rank=rank, ep_rank=self._ep_rank)
        states = f"optimizer/rank-{rank:05d}.safetensors"
        elements = write_fragments(folder / states, fragments)
        for name, value in extras.items():
            torch.save(value, folder / name)
        names = {states, *extras, *(f"hf/{place.file}" for place in written.values())}
        return Part(written, elements, {name: measure(folder / name) for name in names})

    def _commit(self, writing: Writing, parts: list[Part]) -> None:
        """On rank 0, once all ranks have written: turn the folder into a checkpoint."""
        if not self._ranks.is_main:
            return
        step, folder = writing.step, writing.folder
        model, stage, dtype = self._config.model, self._config.stage, DTYPES[self._config.dtype]
        tokenizer, hf = tokenizer_of(self._config.data), folder / "hf"
        weights = {name: place for part in parts for name, place in part.weights.items()}
        stored = sum(place.nbytes for place in weights.values()), sum(part.elements for part in parts)
        expected = model.num_parameters() * dtype.itemsize, model.num_parameters() * writing.fields
        assert stored == expected, f"(bytes of weights, elements of state) {stored} instead of {expected}"
        write_index(weights, hf)
        write_config(model, dtype, hf, [tokenizer.end_of_text])
        (hf / "tokenizer.json").write_bytes(tokenizer.serialized.encode())
        (hf / "chat_template.jinja").write_bytes(self._template)
        files = {name: entry for part in parts for name, entry in part.files.items()}
        files |= {
            f"hf/{path.name}": measure(path) for path in [*hf.glob("*.json"), hf / "chat_template.jinja"]
        }
        fields = {
            "step": step,
            "tokens": step * stage.step_tokens,
            "next_row": step * stage.global_batch_size,
            "attempt": self._attempt,
            "layout": self._layout,
            "files": files,
        }
        sync(hf)
        sync(folder / "optimizer")
        write_manifest(folder, fields)
        final = self._folder / f"step-{step:08d}"
        self._check_fence()
        self._hide([final] if final.exists() else [])
        folder.rename(final)
        sync(self._folder)
        write_atomically(self._run_dir / "latest", f"{final.name}\n".encode())
        self._prune(final)

    def _prune(self, newest: Path) -> None:
        """Remove checkpoints beyond those to keep, and any later than `newest` (left by a rollback)."""
        keep, every = self._config.checkpoint.keep, self._config.checkpoint.keep_every_steps
        there = sorted(self._folder.glob(NAMES))
        past = [path for path in there if path < newest]
        spare = past[: max(0, len(past) - keep + 1)]
        old = [path for path in spare if not every or int(path.name.removeprefix("step-")) % every]
        undone = [path for path in there if path > newest]
        self._hide([path for path in old + undone if not is_read(path)])
        self._writer.submit(self._sweep)

    def _hide(self, doomed: list[Path]) -> None:
        """Rename to hidden names; `_sweep` removes the folders, so that none is visible when half removed."""
        for path in doomed:
            path.rename(path.with_name(f".{path.name}.retired-{self._attempt}"))

    def _sweep(self) -> None:
        """Remove hidden folders, except those that this attempt or a later one is writing."""
        for leftover in self._folder.glob(".step-*"):
            kind, _, attempt = leftover.suffix.rpartition("-")
            if attempt.isdigit() and int(attempt) < self._attempt + (kind == ".retired"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _restore(self, checkpoint: Path, engine: Engine, balance: Balance) -> tuple[int, dict[str, Any]]:
        """Restore a checkpoint that is whole; returns its step and the state of its stage."""
        files = sorted((checkpoint / "optimizer").iterdir())
        first = self._ranks.rank % len(files)  # on the same layout, this rank's own file holds all it needs
        files = files[first:] + files[:first]
        self._agree(f"restore {checkpoint}", fill_fragments, engine.fragments(), files)
        self._saved = step = read_manifest(checkpoint)["step"]
        engine.end_restore(step)
        found: dict[str, Any] = {"stage.pt": {}}  # a stage without a state writes no file

        def read() -> None:
            names = ["balance.pt", "random.pt", *(path.name for path in checkpoint.glob("stage.pt"))]
            found.update({name: read_tensors(checkpoint / name) for name in names})

        self._agree(f"restore {checkpoint}", read)
        balance.load_state(found["balance.pt"])
        generators = found["random.pt"]
        if self._ranks.rank < len(generators):  # a new rank keeps the state from its seed
            set_random_state(generators[self._ranks.rank])
        return step, found["stage.pt"]


def _on_host(tensor: Tensor) -> Tensor:
    """A copy on the host; from a GPU through pinned memory, to which transfers are much faster."""
    return staged(tensor, _pinned()) if tensor.is_cuda else tensor.detach().to("cpu", copy=True)


@cache
def _pinned() -> Tensor:
    return torch.empty(2**26, dtype=torch.uint8, pin_memory=True)


def staged(tensor: Tensor, buffer: Tensor) -> Tensor:
    """A copy on the host, made in parts that pass through `buffer`, bytes on the host."""
    copy = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
    stage = buffer.view(tensor.dtype)
    parts = (whole.detach().flatten().split(len(stage)) for whole in (tensor, copy))
    for source, target in zip(*parts, strict=True):
        target.copy_(stage[: len(source)].copy_(source))
    return copy
