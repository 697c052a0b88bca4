"""Batches for training: the same global batches for any number of ranks, resumed from one integer."""
# B rows of a micro-batch, S seq_len, D documents

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.config import DataConfig, DataError
from data_pipeline.manifest import Manifest
from data_pipeline.mixture import Mixture, MixtureSource, skip_rows
from data_pipeline.packing import (
    JOINT,
    NO_LOSS,
    BestFitRows,
    ConcatRows,
    Stream,
    open_rows,
    open_streams,
    pack_rows,
)
from data_pipeline.shards import TokenStream, open_prepared
from data_pipeline.streaming import TextStream
from data_pipeline.tokenizer import tokenizer_of

_STEPS_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    input_ids: Tensor  # [B,S] int64
    labels: Tensor  # [B,S] int64, already shifted: the target of position t; -100 = no loss
    position_ids: Tensor  # [B,S] int64, from 0 in every document and every row
    cu_seqlens: Tensor  # [D+1] int32: document borders over the flattened B*S tokens, first 0, last B*S
    token_mask: Tensor  # [B,S] bool: False on padding
    rows: tuple[int, ...]  # global row numbers, as data.skip counts them
    lengths: tuple[int, ...]  # [D] tokens of each document
    label_tokens: int  # tokens with a label
    tokens: int  # tokens that are not padding

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        token_mask: Tensor,
        rows: tuple[int, ...],
    ) -> "Batch":
        """A batch of tensors on the host. The numbers that the host needs are computed here, once."""
        lengths, label_tokens = tuple(cu_seqlens.diff().tolist()), int((labels != NO_LOSS).sum())
        tensors = (input_ids, labels, position_ids, cu_seqlens, token_mask)
        return cls(*tensors, rows, lengths, label_tokens, int(token_mask.sum()))

    def options(self) -> dict[str, Any]:
        """What the model's forward takes beside these tensors; other kinds of batches have some."""
        return {}

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device. If it is in pinned memory, the host does not wait for the copies."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The same batch in pinned memory of the host."""
        return self._each(Tensor.pin_memory)

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {
            key: function(value) for key, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


class Loader(Iterator[list[Batch]], AbstractContextManager["Loader"]):
    """Iterates over optimizer steps; each is the list of this rank's micro-batches.

    Slot b of micro-batch m on rank r is global row step * global_batch_size + (m * world_size + r) *
    micro_batch_size + b of the rows that data.skip leaves. The content of a row does not depend on the ranks.
    `next_row` is the first row that is not yet handed out: a new Loader that starts there continues exactly.

    source=None: the endless mixture of the sources. source=NAME: only that source, once, without shuffling;
    the last step is filled up with padding rows, so that all ranks have the same number of micro-batches. A
    thread reads batches ahead; with `pin`, into pinned memory, from which a GPU copies while the host works.
    Raises DataError for a folder that is damaged or was not prepared as configured, and for prompts.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seq_len: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        next_row: int = 0,
        split: str = "train",
        source: str | None = None,
        pin: bool = False,
    ) -> None:
        assert global_batch_size % (world_size * micro_batch_size) == 0, (global_batch_size, world_size)
        assert split == "train" or source is not None, "validation rows are read source by source"
        assert config.mode == "prepared" or source is None, "a text stream has no end"
        self.next_row = self._read_row = next_row
        self._seq_len, self._predict_first_token = seq_len, config.predict_first_token
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self._rank, self._world_size, self._source, self._pin = rank, world_size, source, pin

        if source is not None:  # length_shares apply only to all sources together
            config = replace(config, length_shares={})
        names = config.trained_sources() if source is None else {source}
        if problems := config.reading_problems(as_prompts=False, source=source):
            raise DataError("\n".join(problems))
        self.manifest: Manifest | None = None
        self._streams: Mapping[str, Stream]
        if config.mode == "prepared":
            folder = Path(config.dir)
            self.manifest = open_prepared(folder)
            self.manifest.check_settings(config.content_settings(), folder)
            self._streams = open_streams(folder, self.manifest, split, names)
            self._end_of_text = self.manifest.tokenizer.end_of_text
        else:
            tokenizer = tokenizer_of(config)
            self._streams = {name: TextStream(config, name, tokenizer, seed) for name in sorted(names)}
            self._end_of_text = tokenizer.end_of_text
        self._rows = open_rows(config, self._streams, self._end_of_text, split, seq_len, seed)
        self._mixture = self._mix(config, seed) if source is None else None
        self._end_row = sys.maxsize if source is None else len(self._rows[source])  # the mixture is endless
        self._skip = config.skip if source is None else []

        self._pool = ThreadPoolExecutor(1, "loader")
        self._ahead = deque[Future[list[Batch]]]()  # the next steps
        self._error: BaseException | None = None

    def check_budget(self, total_rows: int) -> None:
        """Raise a DataError that lists the sources whose max_epochs is too low for `total_rows` rows."""
        if self._mixture is not None:
            self._mixture.check_budget(skip_rows(total_rows - 1, self._skip) + 1)

    def origins(self, row: int) -> list[str]:
        """Where each document of a row of a prepared folder comes from. row: as counted in Batch.rows."""
        assert self.manifest is not None
        names = {id(stream): name for name, stream in self._streams.items()}
        found = []
        rows, local_row = self._locate(row)
        for stream, token in rows.places(local_row):
            assert isinstance(stream, TokenStream)
            name, place = names[id(stream)], stream.document_at(token)
            path, within = self.manifest.inputs[name][place.file].path, token - place.start
            what = f"document {place.document} from its token {within}"
            found.append(f"{name}, {what}, {path} at {place.offset}")
        return found

    def describe(self) -> list[str]:
        """A line for each source that is read: rows in an epoch, and the result of packing its documents."""
        return [f"{name}: {rows.describe()}" for name, rows in self._rows.items()]

    def seen(self) -> dict[str, dict[str, float]]:
        """Tokens and epochs of each source of the mixture in the rows handed out so far; empty for text
        streams."""
        if self._mixture is None or self.manifest is None or self.next_row == 0:
            return {}
        rows = self._mixture.rows_needed(skip_rows(self.next_row - 1, self._skip) + 1)
        sources = self._mixture.sources
        return {
            name: {"tokens": round(count * sources[name].row_tokens), "epochs": count / sources[name].rows}
            for name, count in rows.items()
        }

    def __next__(self) -> list[Batch]:
        if self._error is not None:
            raise self._error
        ahead = self._ahead
        while len(ahead) <= _STEPS_AHEAD and self._read_row < self._end_row:
            ahead.append(self._pool.submit(self._step, self._read_row))
            self._read_row += self._global_batch_size
        if not ahead:
            self.close()
            raise StopIteration
        try:
            batches = ahead.popleft().result()
        except CancelledError:  # closed by another thread
            raise StopIteration from None
        except BaseException as error:
            self._error = error
            self.close()
            raise
        self.next_row += self._global_batch_size
        return batches

    def close(self) -> None:
        """Stop reading ahead after the step that is being read, and end the iteration."""
        self._end_row, self._ahead = 0, deque()
        self._pool.shutdown(cancel_futures=True)
        for stream in self._streams.values():
            stream.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _mix(self, config: DataConfig, seed: int) -> Mixture:
        of_joint = [s.max_epochs for s in config.sources.values() if s.weight and s.max_epochs is not None]
        is_prepared = config.mode == "prepared"  # a text stream counts its epochs itself
        sources = {}
        for name, rows in self._rows.items():
            weight, limit = 1.0, min(of_joint, default=None)
            if name != JOINT:
                weight, limit = config.sources[name].weight, config.sources[name].max_epochs
            sources[name] = MixtureSource(weight, len(rows), limit if is_prepared else None, rows.mean_tokens)
        changes: dict[int, dict[str, float]] = {}  # row -> weights
        for tokens, weights in sorted(config.weight_changes.items()):
            changes.setdefault(-(-tokens // self._seq_len), {}).update(weights)
        return Mixture(sources, seed, changes, config.weights.alpha, shuffle=is_prepared)

    def _step(self, first_row: int) -> list[Batch]:
        stride = self._world_size * self._micro_batch_size
        start = first_row + self._rank * self._micro_batch_size
        return [self.batch(row) for row in range(start, start + self._global_batch_size, stride)]

    def batch(self, first_row: int) -> Batch:
        """The micro-batch that begins with a row, wherever the loader is."""
        numbers = tuple(skip_rows(first_row + slot, self._skip) for slot in range(self._micro_batch_size))
        located = [self._locate(number) for number in numbers]
        found = [rows.read(local_row) for rows, local_row in located]
        packed = pack_rows(found, self._seq_len, self._end_of_text, self._predict_first_token)
        input_ids, labels, position_ids, cu_seqlens, token_mask = map(torch.from_numpy, packed)
        batch = Batch.of(input_ids, labels, position_ids, cu_seqlens, token_mask, numbers)
        return batch.pinned() if self._pin else batch

    def _locate(self, row: int) -> tuple[ConcatRows | BestFitRows, int]:
        if self._mixture is None:
            assert self._source is not None
            return self._rows[self._source], row
        location = self._mixture.locate(row)
        return self._rows[location.source], location.row
