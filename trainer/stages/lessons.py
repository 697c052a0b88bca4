"""What a teacher says of each row: computed by its model beside training, or beforehand by `trainer.teach`.

teacher.json                      what the lessons were made with, and the rows of a file
rows-000000000000.safetensors     of the first rows of the data order, as data.skip counts them, R in a file:
    ids                           [R, S, k] int32, `Lesson.ids`
    log_probs                     [R, S, k+1] fp32
    rows_crc32                    [R] int64 checksums of the tokens and positions that the teacher read
"""

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data_pipeline.config import DataError
from data_pipeline.loader import Batch
from data_pipeline.manifest import to_json, write_atomically
from moe.config import ConfigError, ModelConfig
from moe.distillation import Teaching
from moe.model import CausalLM
from trainer.ranks.runtime import Ranks
from trainer.settings.config import RunConfig
from trainer.settings.distill import RECORD
from trainer.settings.hub import fetch, is_hub_name
from trainer.settings.run_folder import hf_folder
from trainer.stages.stage import BuildModel

Told = tuple[Tensor, Tensor]  # ids and log-probabilities of a `Lesson`
FILE_BYTES, FILE_ROWS = 2**26, 64  # at most, in a file


class Teacher:
    """The teacher's model. All ranks of its expert-parallel groups must ask at the same time."""

    def __init__(self, config: RunConfig, ranks: Ranks, build_model: BuildModel) -> None:
        assert config.distill is not None
        of, self._device = config.distill, ranks.device
        self._how = Teaching(of.top_k, of.temperature)
        is_name = is_hub_name(of.teacher)
        folder = fetch(of.teacher, weights=False) if is_name else hf_folder(Path(of.teacher))
        stage = replace(config.stage, init_from=of.teacher)
        init = replace(config.init, upcycle="none")
        theirs = replace(
            config, model=ModelConfig.of_folder(folder), stage=stage, init=init, recompute="none"
        )
        self._model: CausalLM = build_model(theirs).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Told:
        """Of every token of a batch: ids [T,k] and log-probabilities [T,k+1], on the device."""
        here = batch.to(self._device)
        rows = (here.input_ids, here.position_ids, here.cu_seqlens)
        told = self._model(*rows, lengths=here.lengths, how=self._how).taught
        assert told is not None
        return told


class Lessons:
    """A folder of what the teacher has said beforehand. Raises ConfigError for another kind of folder."""

    def __init__(self, config: RunConfig) -> None:
        assert config.distill is not None
        assert config.distill.lessons is not None
        config.distill.check_lessons(config.stage.seq_len)
        self._folder = Path(config.distill.lessons)
        self.rows_per_file: int = json.loads((self._folder / RECORD).read_text())["rows_per_file"]
        self.row_bytes = _row_bytes(config)
        self._checked: set[Path] = set()

    def __call__(self, batch: Batch) -> Told:
        """As `Teacher`, on the host. Raises DataError if a row is absent, damaged or not of these tokens."""
        told = [self._row(row, crc) for row, crc in zip(batch.rows, checksums(batch), strict=True)]
        ids, log_probs = (torch.cat(parts) for parts in zip(*told, strict=True))
        return ids, log_probs

    def _row(self, row: int, crc: int) -> Told:
        """Of one row: ids [S,k] and log-probabilities [S,k+1]."""
        path, place = self.file_of(row), row % self.rows_per_file
        again = "make it again with python -m trainer.teach and the same keys"
        try:
            if path not in self._checked:
                self._check(path)
            with safe_open(path, "pt") as file:
                if place >= len(crcs := file.get_tensor("rows_crc32")):
                    raise FileNotFoundError
                if int(crcs[place]) != crc:
                    what = (
                        f"{path}: row {row} is not that of this run: its data, its order or its seed differ"
                    )
                    raise DataError(f"{what}; set the same, or delete the folder and {again}")
                ids, log_probs = (file.get_slice(name)[place] for name in ("ids", "log_probs"))
        except FileNotFoundError as error:
            raise DataError(f"{path} with row {row} is absent; {again}") from error
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read ({error}); delete it and {again}") from error
        return ids, log_probs

    def file_of(self, row: int) -> Path:
        """The file that holds a row of the data order."""
        return self._folder / f"rows-{row - row % self.rows_per_file:012d}.safetensors"

    def absent(self, rows: int) -> list[int]:
        """The first rows of the files that do not hold all of the first `rows` rows that belong into them."""
        return [
            first
            for first in range(0, rows, self.rows_per_file)
            if self._holds(first) < self._size(first, rows)
        ]

    def _size(self, first: int, rows: int) -> int:
        return min(self.rows_per_file, rows - first)

    def _holds(self, first: int) -> int:
        """How many rows the file that begins with a row has."""
        try:
            with safe_open(self.file_of(first), "pt") as file:
                return file.get_slice("rows_crc32").get_shape()[0]
        except FileNotFoundError:
            return 0
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self.file_of(first)} cannot be read ({error}); delete it") from error

    def write(self, first: int, rows: int, told: list[tuple[Batch, Tensor, Tensor]]) -> None:
        """Write a file with its part of the first `rows` rows, from batches on the host and their answers."""
        size, seq_len = self._size(first, rows), told[0][0].input_ids.shape[1]
        of_rows = zip(
            *((of.cpu().unflatten(0, (-1, seq_len)) for of in answers) for _, *answers in told), strict=True
        )
        ids, log_probs = (torch.cat(of)[:size] for of in of_rows)
        crcs = [crc for batch, *_ in told for crc in checksums(batch)]
        tensors = {"ids": ids, "log_probs": log_probs, "rows_crc32": torch.tensor(crcs[:size])}
        try:
            write_atomically(self.file_of(first), save(tensors, {"crc32": _crc32(tensors)}))
        except OSError as error:
            what = f"{self.file_of(first)} cannot be written ({error.strerror})"
            raise DataError(f"{what}; make room and give the command again, it goes on") from error

    def _check(self, path: Path) -> None:
        """Raises DataError if the bytes of a file are not those that were written."""
        with safe_open(path, "pt") as file:
            said, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if said.get("crc32") != _crc32(tensors):
            raise DataError(f"{path} is damaged; delete it and make it again with python -m trainer.teach")
        self._checked.add(path)


def open_lessons(config: RunConfig, ranks: Ranks, build_model: BuildModel) -> Callable[[Batch], Told]:
    """What a run learns from, beside its labels."""
    assert config.distill is not None
    if config.distill.lessons is not None:
        return Lessons(config)
    return Teacher(config, ranks, build_model)


def begin_folder(config: RunConfig) -> None:
    """Make distill.lessons, or check that it is a folder of the same lessons."""
    assert config.distill is not None
    record, seq_len = config.distill.record(config.stage.seq_len), config.stage.seq_len
    folder = Path(str(config.distill.lessons))
    if (folder / RECORD).exists():
        config.distill.check_lessons(seq_len)
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"distill.lessons={folder} holds something else; name a new folder")
    rows = max(1, min(FILE_ROWS, FILE_BYTES // _row_bytes(config)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / RECORD, to_json(record | {"rows_per_file": rows}))
    except OSError as error:
        raise ConfigError(
            f"distill.lessons={folder} cannot be written ({error.strerror}); name another"
        ) from error


def _row_bytes(config: RunConfig) -> int:
    assert config.distill is not None
    return config.stage.seq_len * (2 * config.distill.top_k + 1) * 4


def checksums(batch: Batch) -> list[int]:
    """Of each row of a batch on the host: its tokens and its positions, 0 where a document begins."""
    both = zip(batch.input_ids, batch.position_ids, strict=True)
    return [zlib.crc32(positions.numpy(), zlib.crc32(tokens.numpy())) for tokens, positions in both]


def _crc32(tensors: dict[str, Any]) -> str:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].contiguous().numpy(), crc)
    return f"{crc:08x}"
