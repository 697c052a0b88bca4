"""data.mode=streaming: text is tokenized while a run reads it, for a quick look without a prepared folder."""

import itertools
import os
import sys
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from data_pipeline.config import CHAT_TEMPLATES, DataConfig, DataError, SourceConfig
from data_pipeline.documents import (
    NOT_BAD,
    Document,
    Reject,
    check_columns,
    encoded,
    keys_of,
    read_documents,
)
from data_pipeline.files import is_address
from data_pipeline.inputs import list_inputs
from data_pipeline.readers import Row, format_of, hub_rows, is_hub, plan_slices, read_rows
from data_pipeline.tokenizer import Tokenizer

_LEAST_ROWS = 1000  # the share of bad rows is taken of at least this many rows


class TextStream:
    """The training tokens of a source, read like a TokenStream, epoch after epoch without an end.

    Reading tokenizes all text up to the tokens asked for; to read earlier tokens, it starts again from the
    beginning. Every rank reads all of the text, so a row is the same on any number of ranks. Raises DataError
    for inputs that are missing or without text column; on reading, for too many bad rows or epochs.
    """

    def __init__(self, config: DataConfig, name: str, tokenizer: Tokenizer, seed: int) -> None:
        self._config, self._name, self._tokenizer, self._seed = config, name, tokenizer, seed
        self._source, self._key = config.sources[name], f"data.sources.{name}"
        check_columns(name, self._source, self._rows())
        self._rewind()

    def __len__(self) -> int:
        return sys.maxsize

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as uint32."""
        self._advance(start, stop)
        return self._tokens[start - self._first : stop - self._first]

    def read_loss(self, start: int, stop: int) -> np.ndarray:
        """Which of the tokens [start, stop) are learned, as bool."""
        self._advance(start, stop)
        return self._learned[start - self._first : stop - self._first]

    def close(self) -> None:
        self._documents.close()

    def _rewind(self) -> None:
        self._documents = self._epochs()
        self._first, self._tokens, self._learned = 0, np.empty(0, np.uint32), np.empty(0, np.bool_)

    def _advance(self, start: int, stop: int) -> None:
        """Read on until the tokens [start, stop), and few others, are in memory."""
        if start < self._first:
            self._rewind()
        while self._first + len(self._tokens) < stop:
            ids, loss = next(self._documents)
            past = min(start - self._first, len(self._tokens))
            self._first += past
            self._tokens = np.concatenate([self._tokens[past:], ids])
            self._learned = np.concatenate([self._learned[past:], loss])

    def _epochs(self) -> Generator[tuple[np.ndarray, np.ndarray]]:
        """For each document its ids, and which of them are learned."""
        for epoch in itertools.count(1):
            before = self._first + len(self._tokens)
            for _, ids, loss in encoded(self._tokenizer, self._chosen()):
                yield ids, np.ones(len(ids), np.bool_) if loss is None else loss
            after = self._first + len(self._tokens)
            if after == before or epoch == self._source.max_epochs:
                remedy = "add text, raise max_epochs, lower its weight, or train on fewer tokens"
                raise DataError(f"{self._key}: epoch {epoch} is over after {after} tokens; {remedy}")

    def _chosen(self) -> Iterator[Document]:
        """The documents of an epoch that are trained on."""
        config, seen, bad = self._config, set[bytes](), 0
        items = read_documents(config, self._name, self._rows(), self._tokenizer)
        for rows, item in enumerate(items, 1):
            if isinstance(item, Reject):
                if config.on_bad_row == "error" and item.code not in NOT_BAD:
                    raise item.error()
                bad += item.code not in NOT_BAD
                if bad > config.max_bad_fraction * max(rows, _LEAST_ROWS):
                    what = f"{bad} of the first {rows} rows are bad, more than data.max_bad_fraction="
                    raise DataError(f"{self._key}: {what}{config.max_bad_fraction}; the last: {item.reason}")
            elif not item.is_held_out(self._seed, config.validation_fraction):
                keys = keys_of(item, config.deduplicate)
                if not keys or keys[0] not in seen:
                    seen.update(keys)
                    yield item

    def _rows(self) -> Iterator[Row]:
        """All rows, file after file; those of a hub dataset are fetched as they are read."""
        of_hub = [path for path in self._source.paths if is_hub(self._source, path)]
        for path in dict.fromkeys(of_hub):
            yield from hub_rows(f"{self._key}.paths: {path}", path)
        source = replace(self._source, paths=[path for path in self._source.paths if path not in of_hub])
        files = list_inputs(self._name, source, {}, hashed=False)
        for part in itertools.chain.from_iterable(plan_slices(source, files, self._config.slice_bytes)):
            yield from read_rows(source, part)


def absolute_paths(config: DataConfig) -> dict[str, Any]:
    """The keys of a configuration that hold paths, made absolute, so that a run can go on from any folder."""

    def absolute(source: SourceConfig, path: str) -> str:
        is_name = is_hub(source, path) or is_address(path) or format_of(source.kind, path) == "embedded"
        return path if is_name else os.path.abspath(path)

    sources = {name: {"paths": [absolute(of, p) for p in of.paths]} for name, of in config.sources.items()}
    tokenizer = config.tokenizer
    if tokenizer is not None and os.path.exists(tokenizer):
        tokenizer = os.path.abspath(tokenizer)
    exclude = [path if is_address(path) else os.path.abspath(path) for path in config.exclude]
    return {"tokenizer": tokenizer, "sources": sources, "exclude": exclude}


def absolute_template(config: DataConfig) -> str:
    """`data.chat_template`, whose file has an absolute path."""
    name = config.chat_template
    return name if name in CHAT_TEMPLATES else os.path.abspath(name)
