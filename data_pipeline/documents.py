"""Documents from rows, and their token ids. A row that is not a document becomes a reject with the reason."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline import chat, forms
from data_pipeline.config import CHAT_KINDS, DataConfig, DataError, SourceConfig
from data_pipeline.files import find, version
from data_pipeline.overlap import BANDS, SEQUENCE, WordSequences, band_keys, words_of
from data_pipeline.readers import BLANK, Row, file_rows
from data_pipeline.templated import Qwen3, open_template
from data_pipeline.tokenizer import Tokenizer

KEYS = {"none": 0, "exact": 1, "minhash": BANDS}  # of a text, by data.deduplicate
CONTAMINATED = "contaminated"  # code of a document that shares words with a text of data.exclude
NOT_BAD = (BLANK, CONTAMINATED)  # codes of rows that are left out without being bad
_HEAD_BYTES = 200
_BATCH_BYTES = 1 << 20
_PROBED_ROWS = 64
_HASHES_AT_ONCE = 1 << 26  # sorting this many takes about 3 GB


class Document(NamedTuple):
    """A text, or the pieces of a conversation, with the row that it comes from."""

    row: Row
    text: str  # empty for a conversation
    pieces: list[chat.Piece] | None
    data: bytes  # equal for equal documents: the UTF-8 of a text, the JSON of `pieces`
    fields: bytes | None = None  # of a prompt: the JSON of its row, for verifiers
    ignored: frozenset[str] = frozenset()  # of a conversation: keys of its messages that are not used

    def is_held_out(self, seed: int, validation_fraction: float) -> bool:
        """Whether its hash selects it for validation; equal documents are in the same split."""
        digest = hashlib.blake2b(self.data, digest_size=8, key=str(seed).encode()).digest()
        return int.from_bytes(digest, "little") < validation_fraction * 2**64


class Reject(NamedTuple):
    """A rejected row, or a rejected sample of a row. reason: `code` or `code: details`."""

    row: Row
    reason: str

    @property
    def code(self) -> str:
        """The code of the reason, by which rejects are counted."""
        found = re.match(r"(?:messages\[\d+\]: )?(\w+)(?::|$)", self.reason)
        return found[1] if found else "messages"

    def head(self, size: int | None = _HEAD_BYTES) -> str:
        """The first `size` bytes of the row (None = all), decoded with `surrogateescape` where not UTF-8."""
        raw = json.dumps(self.row.value, default=str).encode() if self.row.raw is None else self.row.raw
        return raw[:size].decode("utf-8", "surrogateescape")

    def error(self) -> DataError:
        """The error to raise under on_bad_row=error."""
        what = f"{self.row.part.path}: the row at {self.row.offset} is bad ({self.reason}): {self.head()!r}"
        remedy = "fix it (a preparation then needs a new data.dir), or set data.on_bad_row=skip"
        return DataError(f"{what}; {remedy}")


def keys_of(document: Document, how: str) -> list[bytes]:
    """At most KEYS[how] keys of 16 bytes; documents that share one are equal or similar. how: deduplicate."""
    # what conversations share by nature, as a system prompt or the turns of an earlier sample, is no likeness
    if how == "minhash" and document.pieces is None:
        return band_keys(document.text)
    return [] if how == "none" else [hash_document(document.data)]


def read_documents(
    config: DataConfig, name: str, rows: Iterable[Row], tokenizer: Tokenizer | None = None
) -> Iterator[Document | Reject]:
    """The documents and rejects of the rows of source `name`, in order; blank lines are rejects too. The
    tokenizer is needed only to apply `max_chat_tokens` to conversations. Raises DataError for a chat template
    that cannot be used."""
    source, excluded = config.sources[name], word_sequences(config.exclude)
    template = open_template(config.chat_template)
    for row in rows:
        items: list[Document | Reject]
        try:
            if row.fault is not None:
                raise ValueError(row.fault)
            if source.kind in CHAT_KINDS:
                documents = _conversations(row, source, template, config.think_flag_share)
                items = [_limited(document, config.max_chat_tokens, tokenizer) for document in documents]
            else:
                items = [_text(row, _content(row, source.text_column), config.min_characters)]
        except UnicodeEncodeError:
            items = [Reject(row, "utf8: a lone surrogate")]
        except RecursionError:
            items = [Reject(row, "json: nested too deeply")]
        except ValueError as error:
            items = [Reject(row, str(error))]
        yield from items if excluded is None else (_clean(item, excluded) for item in items)


def _clean(item: Document | Reject, excluded: WordSequences) -> Document | Reject:
    """The item, unless it is a document that shares words with an excluded text."""
    if isinstance(item, Reject):
        return item
    texts = [item.text] if item.pieces is None else [of.text for of in item.pieces if of.text is not None]
    shared = next(filter(None, map(excluded.shared_with, texts)), None)
    return item if shared is None else Reject(item.row, f"{CONTAMINATED}: data.exclude has {shared!r} too")


def word_sequences(patterns: list[str]) -> WordSequences | None:
    """The word sequences of the files of data.exclude; None without files. Raises DataError for a row that
    cannot be read, and for a file that excludes nothing."""
    paths = [path for pattern in patterns for path in find(pattern)]
    try:
        return _sequences_of(tuple((path, *version(path)) for path in paths)) if paths else None
    except DataError as error:
        what = "its texts would be learned; correct the file, or leave it out"
        raise DataError(f"data.exclude: {error}; {what}") from error


@lru_cache(maxsize=1)
def _sequences_of(files: tuple[tuple[str, int, int], ...]) -> WordSequences:
    return WordSequences(text for path, *_ in files for text in _excluded_texts(path))


def _excluded_texts(path: str) -> Iterator[str]:
    """The texts of a file of data.exclude. Raises DataError if none of them is long enough to be found."""
    longest = 0
    for text in (text for row in file_rows(path) for text in _texts_in(_sound(row).value)):
        longest = longest if longest >= SEQUENCE else max(longest, len(words_of(text)))
        yield text
    if longest < SEQUENCE:
        law = f"only texts of at least {SEQUENCE} words exclude something"
        raise DataError(f"{path}: its longest text has {longest} words, and {law}")


def _sound(row: Row) -> Row:
    """The row. Raises DataError if it cannot be read: what it holds would be learned without a word."""
    if row.value is None and row.fault not in (None, BLANK):
        where = f"{row.part.path}: the row at {row.offset} cannot be read ({row.fault})"
        raise DataError(f"{where}; write one JSON object a line, in UTF-8")
    return row


def _texts_in(value: Any) -> Iterator[str]:
    """Every text in a row, alone."""
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts_in(part)


def _content(row: Row, column: str | None) -> Any:
    """The value of a column of a row; without a column, the whole row. Raises ValueError, with the reason, if
    there is none."""
    if column is None:
        return row.value
    if column not in row.value:
        names = ", ".join(map(repr, row.value)) or "nothing"
        raise ValueError(f"missing: the row has no {column!r}, only {names}")
    if row.value[column] is None:
        raise ValueError("null")
    return row.value[column]


def _text(row: Row, content: object, min_characters: int) -> Document:
    """A text as a document. Raises ValueError, with the reason, if it is not a usable text."""
    if not isinstance(content, str):
        raise ValueError(f"type: the text is of type {type(content).__name__}")
    if not content or content.isspace():
        raise ValueError("empty")
    if len(content) < min_characters:
        raise ValueError(f"too_short: {len(content)} characters")
    return Document(row, content, None, content.encode())


def _conversations(
    row: Row, source: SourceConfig, template: Qwen3, think_flag_share: float | None
) -> list[Document]:
    """The prompt, or the samples of the conversation, of a row. Raises ValueError, with the reason, for a bad
    row."""
    fields = _fields(row, source.verified_fields) if source.kind == "prompts" else None
    conversation, ignored = forms.read(row.value, source)
    if fields is None:
        found = template.samples(conversation, think_flag_share)
    else:
        found = [template.prompt(conversation, row.value.get("enable_thinking"))]
    return [Document(row, "", pieces, json.dumps(pieces).encode(), fields, ignored) for pieces in found]


def _fields(row: Row, verified_fields: list[str]) -> bytes:
    """The row of a prompt as JSON. Raises ValueError, with the reason, if it cannot be verified or kept."""
    if lost := [key for key in verified_fields if row.value.get(key) is None]:
        law = "for its verifiers (required_fields of the source names what they need)"
        raise ValueError(f"missing: the row has no {', '.join(map(repr, lost))} {law}")
    return chat.to_json(row.value, ensure_ascii=False).encode()


def _limited(document: Document, most: int | None, tokenizer: Tokenizer | None) -> Document | Reject:
    """A conversation or prompt, if it has at most `most` tokens."""
    # a token has at least one byte, so most conversations need not be tokenized for the count
    if most is None or tokenizer is None or document.pieces is None or len(document.data) <= most:
        return document
    is_closed = document.fields is None  # the closing id of a prompt is not given to the model
    length = len(chat.encode(document.pieces, tokenizer)[0]) + is_closed
    return Reject(document.row, f"too_long: {length} tokens") if length > most else document


def encoded(
    tokenizer: Tokenizer, documents: Iterable[Document]
) -> Iterator[tuple[Document, np.ndarray, np.ndarray | None]]:
    """Documents with their ids (uint32), closed by the end-of-text id, and, for conversations, which
    ids are learned (bool)."""
    documents = iter(documents)
    while batch := list(_megabyte(documents)):
        texts = iter(tokenizer.encode_batch([item.text for item in batch if item.pieces is None]))
        for document in batch:
            loss = None
            if document.pieces is None:
                ids = np.array(next(texts), dtype=np.uint32)
            else:
                ids, loss = chat.encode(document.pieces, tokenizer)
                loss = np.append(loss, False)
            if (ids == tokenizer.end_of_text).any():
                what = "the tokenizer makes its end-of-text id from plain text, which would cut documents"
                raise DataError(f"{what}; use a tokenizer whose model cannot produce it")
            yield document, np.append(ids, np.uint32(tokenizer.end_of_text)), loss


def _megabyte(documents: Iterator[Document]) -> Iterator[Document]:
    size = 0
    for document in documents:
        yield document
        size += len(document.data)
        if size >= _BATCH_BYTES:
            return


def check_columns(name: str, source: SourceConfig, rows: Iterable[Row]) -> None:
    """Raise DataError, which lists the columns, if none of the first rows of a source has its text column or,
    for conversations, the columns of one of its forms."""
    key, column, is_chat = f"data.sources.{name}", source.text_column, source.kind in CHAT_KINDS
    found: dict[str, str] = {}
    sound = (row.value for row in rows if row.fault is None)
    for row in itertools.islice(sound, _PROBED_ROWS) if column is not None or is_chat else ():
        if is_chat and forms.form_of(
            source, {of for of, value in row.items() if isinstance(value, str | list)}
        ):
            return
        if not is_chat and isinstance(row.get(column), str):
            return
        found |= {of: type(value).__name__ for of, value in row.items()}
    if found and is_chat:
        raise DataError(f"{key}: {forms.misfit(source, found)}")
    if found:
        listed = ", ".join(f"{of}: {kind}" for of, kind in found.items())
        law = f"its first rows have no {column!r} of type str; their columns are {listed}"
        raise DataError(f"{key}: {law}; set {key}.text_key to one of them")


def hash_document(data: bytes) -> bytes:
    """A hash of 16 bytes, as `find_duplicates` reads it."""
    return hashlib.blake2b(data, digest_size=16).digest()


def find_duplicates(files: list[Path], at_once: int = _HASHES_AT_ONCE) -> np.ndarray:
    """Numbers (int64, ascending, counted over all files of hashes) of documents that equal an earlier one.
    Each round takes the hashes with one remainder, so that about `at_once` hashes are sorted at a time."""
    rounds = -(-sum(path.stat().st_size for path in files) // (16 * at_once))
    found = [np.empty(0, np.int64)]
    for turn in range(rounds):
        numbers, hashes, first = [], [], 0
        for path in files:
            of_file = np.fromfile(path, dtype="<u8").reshape(-1, 2)
            chosen = np.flatnonzero(of_file[:, 0] % np.uint64(rounds) == turn)
            numbers.append(chosen + first)
            hashes.append(of_file[chosen])
            first += len(of_file)
        number, key = np.concatenate(numbers), np.concatenate(hashes)
        order = np.lexsort((key[:, 1], key[:, 0]))  # stable: the first of equal documents stays first
        is_repeat = (key[order[1:]] == key[order[:-1]]).all(axis=1)
        found.append(number[order[1:][is_repeat]])
    return np.sort(np.concatenate(found))
