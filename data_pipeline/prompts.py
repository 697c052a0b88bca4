"""The prompts of a run that samples its own text: prompt g is a pure function of the configuration and g."""

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.config import DataConfig, DataError
from data_pipeline.mixture import Mixture, MixtureSource, skip_rows
from data_pipeline.packing import open_streams
from data_pipeline.shards import open_prepared


class Prompt(NamedTuple):
    """A prompt, ready to be continued."""

    row: int  # its number in the run, as data.skip counts them; of one source: its number there
    source: str
    ids: list[int]  # up to the header of the answer
    fields: dict[str, Any]  # the row that it comes from


class Prompts(AbstractContextManager["Prompts"]):
    """`prompts[g]` is prompt number g of the run, of those that data.skip leaves.

    A row of the mixture is one prompt: weights are shares of the prompts, and data.weight_changes counts
    prompts. source=None: the endless mixture of the sources. source=NAME: only that source, once, in the
    order of its files. Raises DataError for a folder that is damaged or was not prepared as configured, and
    for sources of another kind.
    """

    def __init__(
        self, config: DataConfig, *, seed: int, split: str = "train", source: str | None = None
    ) -> None:
        assert split == "train" or source is not None, "held-out prompts are read source by source"
        names = config.trained_sources() if source is None else {source}
        if problems := config.reading_problems(as_prompts=True, source=source):
            raise DataError("\n".join(problems))
        folder = Path(config.dir)
        self._manifest = open_prepared(folder)
        self._manifest.check_settings(config.content_settings(), folder)
        self._streams = open_streams(folder, self._manifest, split, names)
        self._source, self._skip = source, config.skip if source is None else []
        self._mixture = None
        if source is None:
            mixed = dict[str, MixtureSource]()
            for name, stream in self._streams.items():
                of = config.sources[name]
                mixed[name] = MixtureSource(of.weight, stream.documents, of.max_epochs, row_tokens=1.0)
            self._mixture = Mixture(mixed, seed, config.weight_changes, config.weights.alpha)

    def __len__(self) -> int:
        """The number of prompts of one source; the mixture is endless."""
        return sys.maxsize if self._source is None else self._streams[self._source].documents

    def __getitem__(self, number: int) -> Prompt:
        """Raises IndexError beyond the end of one source, DataError beyond max_epochs or for damage."""
        row, source, document = self._locate(number)
        ids, fields = self._streams[source].read_document(document)
        return Prompt(row, source, ids[:-1].tolist(), json.loads(fields))  # without the closing id

    def origin(self, number: int) -> str:
        """Where a prompt comes from."""
        _, source, document = self._locate(number)
        place = self._streams[source].place_of(document)
        path = self._manifest.inputs[source][place.file].path
        return f"{source}, document {document}, {path} at {place.offset}"

    def describe(self) -> list[str]:
        """A line for each source that is read."""
        return [f"{name}: {stream.documents:,} prompts" for name, stream in self._streams.items()]

    def longest(self) -> int:
        """The number of tokens of the longest prompt; reads where all of them begin."""
        borders = [of for stream in self._streams.values() for of in stream.document_offsets()]
        return max((int(np.diff(of).max()) - 1 for of in borders), default=0)  # without the closing id

    def check_budget(self, total_prompts: int) -> None:
        """Raise a DataError that lists the sources whose max_epochs is too low for `total_prompts`."""
        if self._mixture is not None:
            self._mixture.check_budget(skip_rows(total_prompts - 1, self._skip) + 1)

    def seen(self, next_prompt: int) -> dict[str, dict[str, float]]:
        """Prompts and epochs of each source of the mixture in the prompts before `next_prompt`."""
        if self._mixture is None or next_prompt == 0:
            return {}
        rows = self._mixture.rows_needed(skip_rows(next_prompt - 1, self._skip) + 1)
        sources = self._mixture.sources
        return {
            name: {"prompts": count, "epochs": count / sources[name].rows} for name, count in rows.items()
        }

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _locate(self, number: int) -> tuple[int, str, int]:
        """The row of a prompt, its source, and its document there."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        row = skip_rows(number, self._skip)
        if self._mixture is None:
            assert self._source is not None
            return row, self._source, row
        location = self._mixture.locate(row)
        return row, location.source, location.row
