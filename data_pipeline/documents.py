"""Documents from rows: every row becomes documents or a reject that says why it is none."""

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from data_pipeline import chat
from data_pipeline.config import DataConfig
from data_pipeline.readers import Part, Row, column_of, read_rows

_HEAD_BYTES = 200


class Document(NamedTuple):
    """A text, or the pieces of a conversation (then `text` is empty), with the row that it comes from. data:
    what equal documents have equal; the UTF-8 of a text."""

    part: Part
    row: Row
    text: str
    pieces: list[chat.Piece] | None
    data: bytes

    def texts(self) -> list[str]:
        """Its text, control tokens left out."""
        return [self.text] if self.pieces is None else [piece.text for piece in self.pieces if piece.text]


class Reject(NamedTuple):
    """A row that is no document. reason: `code` or `code: details`."""

    part: Part
    row: Row
    reason: str

    @property
    def code(self) -> str:
        """The kind of reason, to be counted."""
        found = re.match(r"(?:messages\[\d+\]: )?(\w+)(?::|$)", self.reason)
        return found[1] if found else "messages"

    def head(self, size: int | None = _HEAD_BYTES) -> str:
        """The first bytes of the row, or all; what is no UTF-8 stands as surrogates (`surrogateescape`)."""
        raw = json.dumps(self.row.value, default=str).encode() if self.row.raw is None else self.row.raw
        return raw[:size].decode("utf-8", "surrogateescape")


def read_documents(config: DataConfig, name: str, part: Part) -> Iterator[Document | Reject]:
    """The documents of a part of source `name`, in order, and the rows between them that are none, blank
    lines included."""
    source = config.sources[name]
    column = column_of(source)
    for row in read_rows(source, part):
        content = row.value if column is None or row.fault else row.value.get(column)
        fault = row.fault or _fault(row, column, content, source.kind == "sft", config.min_characters)
        if fault is None and source.kind == "sft":
            try:
                for pieces in chat.samples(row.value, config.think_flag_share):
                    yield Document(part, row, "", pieces, json.dumps(pieces).encode())
                continue
            except ValueError as error:
                fault = str(error)
        if fault is None:
            yield Document(part, row, content, None, content.encode())
        else:
            yield Reject(part, row, fault)


def _fault(row: Row, column: str | None, content: object, is_chat: bool, min_characters: int) -> str | None:
    """Why a row is no document; None if it may be one."""
    if column is not None and column not in row.value:
        return f"missing: the row has no {column!r}, only {', '.join(map(repr, row.value)) or 'nothing'}"
    if content is None:
        return "null"
    if is_chat:
        return None
    if not isinstance(content, str):
        return f"type: the text is of type {type(content).__name__}"
    if not content or content.isspace():
        return "empty"
    if len(content) < min_characters:
        return f"too_short: {len(content)} characters"
    try:
        content.encode()
    except UnicodeEncodeError:
        return "utf8: a lone surrogate"
    return None
