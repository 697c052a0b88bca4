"""Documents from files. A source is cut into slices of like size, each of which can be read alone."""

import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_pipeline import samples
from data_pipeline.config import DataError, SourceConfig

_HEAD_BYTES = 200


class InputFile(NamedTuple):
    """A file that is read; `mtime_ns` only saves reading it again to see that it is unchanged."""

    path: str
    bytes: int
    mtime_ns: int
    sha256: str


class Piece(NamedTuple):
    """What a slice reads of one file: bytes [start, stop); for `embedded` documents."""

    path: str
    start: int
    stop: int
    bytes: int


class Reject(NamedTuple):
    """A row that is no document. offset: its byte in the (decompressed) file; its row number in parquet."""

    path: str
    offset: int
    reason: str
    head: str


OnReject = Callable[[Reject], None]


def list_inputs(name: str, source: SourceConfig, known: dict[str, InputFile]) -> list[InputFile]:
    """The files of a source, in the order in which they are read; hashed, unless `known` has them at this
    size and age.

    Raises DataError for a path or glob without a file.
    """
    if source.kind == "embedded":
        return [_embedded_input(collection) for collection in source.paths]
    found: dict[str, None] = {}
    for pattern in source.paths:
        files = [path for path in sorted(glob.glob(pattern, recursive=True)) if Path(path).is_file()]
        if not files:
            raise DataError(
                f"data.sources.{name}.paths: {pattern} matches no file; a folder is named as folder/**/*.EXT"
            )
        found |= dict.fromkeys(files)
    return [_hashed(path, known.get(path)) for path in found]


def plan_slices(source: SourceConfig, inputs: list[InputFile], slice_bytes: int) -> list[list[Piece]]:
    """Cut a source into slices of about `slice_bytes` (a file that cannot be cut is never split)."""
    slices: list[list[Piece]] = []
    room = 0
    for piece in _pieces(source, inputs, slice_bytes):
        if not slices or piece.bytes > room:
            slices.append([])
            room = slice_bytes
        slices[-1].append(piece)
        room -= piece.bytes
    return slices


def read_slice(source: SourceConfig, pieces: list[Piece], on_reject: OnReject) -> Iterator[str]:
    """The documents of a slice, in order. A bad row costs that row, which goes to `on_reject`.

    Raises DataError for a file that cannot be read as what it is said to be.
    """
    for piece in pieces:
        for offset, text in _READERS[source.kind](source, piece, on_reject):
            fault = _fault(text)
            if isinstance(text, str) and fault is None:
                yield text
            else:
                on_reject(Reject(piece.path, offset, fault or "", repr(text)[:_HEAD_BYTES]))


def _fault(text: object) -> str | None:
    """Why a value is no document; None if it is one."""
    if text is None:
        return "null"
    if not isinstance(text, str):
        return f"type: the text is of type {type(text).__name__}"
    if not text.strip():
        return "empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "utf8: a lone surrogate"
    return None


def _pieces(source: SourceConfig, inputs: list[InputFile], slice_bytes: int) -> Iterator[Piece]:
    for file in inputs:
        if source.kind == "embedded":
            for index, text in enumerate(samples.documents(file.path)):
                yield Piece(file.path, index, index + 1, len(text.encode()))
        elif source.kind == "jsonl" and not file.path.endswith(".gz"):
            for start in range(0, file.bytes, slice_bytes):
                stop = min(start + slice_bytes, file.bytes)
                yield Piece(file.path, start, stop, stop - start)
        else:
            yield Piece(file.path, 0, file.bytes, file.bytes)


def _hashed(path: str, known: InputFile | None) -> InputFile:
    status = Path(path).stat()
    if known is not None and (known.bytes, known.mtime_ns) == (status.st_size, status.st_mtime_ns):
        return known
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return InputFile(path, status.st_size, status.st_mtime_ns, digest)


def _embedded_input(collection: str) -> InputFile:
    digest, size = hashlib.sha256(), 0
    for text in samples.documents(collection):
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
        size += len(data)
    return InputFile(collection, size, 0, digest.hexdigest())


def _read_embedded(source: SourceConfig, piece: Piece, on_reject: OnReject) -> Iterator[tuple[int, object]]:
    yield from enumerate(samples.documents(piece.path)[piece.start : piece.stop], piece.start)


def _read_text(source: SourceConfig, piece: Piece, on_reject: OnReject) -> Iterator[tuple[int, object]]:
    data = Path(piece.path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        yield 0, data.decode()
    except UnicodeDecodeError as error:
        on_reject(Reject(piece.path, error.start, "utf8", repr(data[error.start :][:_HEAD_BYTES])))


def _read_jsonl(source: SourceConfig, piece: Piece, on_reject: OnReject) -> Iterator[tuple[int, object]]:
    for offset, line in _lines(piece, on_reject):
        reason = "json"
        try:
            row = json.loads(line.decode())
            if not isinstance(row, dict):
                reason = f"type: the row is of type {type(row).__name__}, not an object"
            elif source.text_key not in row:
                reason = f"missing: the row has no key {source.text_key!r}"
            else:
                yield offset, row[source.text_key]
                continue
        except UnicodeDecodeError:
            reason = "utf8"
        except (ValueError, RecursionError) as error:
            reason = f"json: {error}"
        on_reject(Reject(piece.path, offset, reason, repr(line[:_HEAD_BYTES])))


def _lines(piece: Piece, on_reject: OnReject) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of the lines that begin in the piece, blank ones left out."""
    if piece.path.endswith(".gz"):
        offset = 0
        try:
            with gzip.open(piece.path, "rb") as file:
                for offset, line in _lines_from(file, 0):
                    yield offset, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            on_reject(Reject(piece.path, offset, f"gzip: the rest of the file is lost ({error})", ""))
        return
    with open(piece.path, "rb") as file:
        if piece.start:  # the line that covers the byte before belongs to the piece before
            file.seek(piece.start - 1)
            file.readline()
        for offset, line in _lines_from(file, file.tell()):
            if offset >= piece.stop:
                return
            yield offset, line


def _lines_from(file: BinaryIO | gzip.GzipFile, offset: int) -> Iterator[tuple[int, bytes]]:
    for line in file:  # cuts at \n only: other line separators of Unicode may stand in a row
        content = line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line
        if content.strip():
            yield offset, content
        offset += len(line)


def _read_parquet(source: SourceConfig, piece: Piece, on_reject: OnReject) -> Iterator[tuple[int, object]]:
    import pyarrow  # slow to import, as is datasets: only for those who read such files
    import pyarrow.parquet
    from datasets import load_dataset

    try:
        columns = pyarrow.parquet.read_schema(piece.path)
        is_text = source.text_key in columns.names and columns.field(source.text_key).type in (
            pyarrow.string(),
            pyarrow.large_string(),
        )
        if not is_text:
            listed = ", ".join(f"{field.name}: {field.type}" for field in columns)
            raise DataError(f"{piece.path} has no text column {source.text_key!r}; its columns are {listed}")
        files = {"train": [piece.path]}
        rows = load_dataset(
            "parquet", data_files=files, split="train", streaming=True, columns=[source.text_key]
        )
        for number, row in enumerate(rows):
            yield number, row[source.text_key]
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{piece.path} is no whole parquet file ({error}); fetch or write it again"
        ) from error


_READERS: dict[str, Callable[[SourceConfig, Piece, OnReject], Iterator[tuple[int, object]]]] = {
    "embedded": _read_embedded,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "text": _read_text,
}
