"""data.mode=streaming: text is tokenized while a run reads it, for a quick look without a prepared folder."""

import itertools
import os
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from data_pipeline.config import DataConfig, DataError
from data_pipeline.documents import Document, Reject, encoded, judge
from data_pipeline.duplicates import hash_document
from data_pipeline.inputs import list_inputs, plan_slices
from data_pipeline.readers import BLANK, Part, Row, check_columns, format_of, hub_rows, is_hub, read_rows
from data_pipeline.tokenizer import Tokenizer

_LEAST_ROWS = 1000  # before a share of bad rows says something
_ENDLESS = 1 << 62


class TextStream:
    """The training tokens of a source as a TokenStream has them, epoch after epoch without an end.

    The documents of a prepared folder in the same order: no bad row, no repeat, none that is held out.
    Reading goes forward and tokenizes what lies between; a step back begins anew. Every rank reads all of
    the text, so a row is the same on any number of ranks, and after a resume if the files still are.

    Raises DataError for inputs that are not there or have no text column; on reading, for a bad row with
    on_bad_row=error, for more bad rows than max_bad_fraction, and for an epoch more than max_epochs.
    """

    def __init__(self, config: DataConfig, name: str, tokenizer: Tokenizer, seed: int) -> None:
        self._config, self._name, self._tokenizer, self._seed = config, name, tokenizer, seed
        self._source = config.sources[name]
        self.has_loss = self._source.kind == "sft"
        check_columns(name, self._source, (row for _, row in self._rows()))
        self._rewind()

    def __len__(self) -> int:
        return _ENDLESS

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as uint32."""
        self._advance(start, stop)
        return self._tokens[start - self._first : stop - self._first]

    def read_loss(self, start: int, stop: int) -> np.ndarray:
        """Which of the tokens [start, stop) are learned, as bool."""
        self._advance(start, stop)
        return self._learned[start - self._first : stop - self._first]

    def close(self) -> None:
        """Close the files."""
        self._documents.close()

    def _rewind(self) -> None:
        self._documents = self._epochs()
        self._first, self._tokens, self._learned = 0, np.empty(0, np.uint32), np.empty(0, np.bool_)

    def _advance(self, start: int, stop: int) -> None:
        """Hold the tokens [start, stop), and few more."""
        if start < self._first:
            self._rewind()
        while self._first + len(self._tokens) < stop:
            ids, loss = next(self._documents)
            past = min(start - self._first, len(self._tokens))
            self._first += past
            self._tokens = np.concatenate([self._tokens[past:], ids])
            self._learned = np.concatenate([self._learned[past:], loss])

    def _epochs(self) -> Generator[tuple[np.ndarray, np.ndarray]]:
        """Ids of the documents, and which of them are learned."""
        limit = self._source.max_epochs
        for epoch in itertools.count(1):
            before = self._first + len(self._tokens)
            for _, ids, loss in encoded(self._tokenizer, self._chosen()):
                yield ids, np.ones(len(ids), np.bool_) if loss is None else loss
            after = self._first + len(self._tokens)
            if after == before or epoch == limit:
                raise DataError(
                    f"data.sources.{self._name}: epoch {epoch} is over after {after} tokens; add text, raise"
                    " max_epochs, lower its weight, or train on fewer tokens"
                )

    def _chosen(self) -> Iterator[Document]:
        """The documents of an epoch that are trained on."""
        config, seen, rows, bad = self._config, set[bytes](), 0, 0
        for part, row in self._rows():
            for item in judge(config, self._name, part, row, self._tokenizer):
                rows += 1
                if isinstance(item, Reject):
                    if config.on_bad_row == "error" and item.code != BLANK:
                        raise item.error()
                    bad += item.code != BLANK
                    if bad > config.max_bad_fraction * max(rows, _LEAST_ROWS):
                        raise DataError(
                            f"data.sources.{self._name}: {bad} of the first {rows} rows are bad, more than"
                            f" data.max_bad_fraction={config.max_bad_fraction}; the last: {item.reason}"
                        )
                elif not item.is_held_out(self._seed, config.validation_fraction):
                    key = hash_document(item.data) if config.deduplicate else b""
                    if key not in seen or not config.deduplicate:
                        seen.add(key)
                        yield item

    def _rows(self) -> Iterator[tuple[Part, Row]]:
        """All rows, file after file; those of a hub dataset are fetched as they are read."""
        is_local = {path: not is_hub(self._source, path) for path in self._source.paths}
        for path in (path for path in is_local if not is_local[path]):
            for row in hub_rows(f"data.sources.{self._name}.paths: {path}", path):
                yield Part(0, path, 0, 0, 0), row
        source = replace(self._source, paths=[path for path in is_local if is_local[path]])
        files = list_inputs(self._name, source, {}, hashed=False)
        for part in itertools.chain.from_iterable(plan_slices(source, files, self._config.slice_bytes)):
            for row in read_rows(source, part):
                yield part, row


def absolute_paths(config: DataConfig) -> dict[str, Any]:
    """The keys of a configuration with its relative paths made absolute, so that a run goes on anywhere."""
    sources = {}
    for name, source in config.sources.items():
        is_path = [not is_hub(source, p) and format_of(source.kind, p) != "embedded" for p in source.paths]
        paths = [os.path.abspath(p) if is_p else p for p, is_p in zip(source.paths, is_path, strict=True)]
        sources[name] = {"paths": paths}
    tokenizer = config.tokenizer
    if tokenizer is not None and os.path.exists(tokenizer):
        tokenizer = os.path.abspath(tokenizer)
    return {"tokenizer": tokenizer, "sources": sources}
