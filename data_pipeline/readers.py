"""Rows from files: JSON lines, tables, text. A row that cannot be read costs that row and says why."""

import contextlib
import functools
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from data_pipeline import samples
from data_pipeline.config import DataError, SourceConfig

if TYPE_CHECKING:
    import pyarrow

COMPRESSED = (".gz", ".zst")
BLANK = "blank"
CHAT_KEY = "messages"
_BOM = b"\xef\xbb\xbf"
_PROBED_ROWS = 64
_TABLE_ROWS = 1024


class Part(NamedTuple):
    """What a slice reads of one file: [start, stop) in bytes of lines, row groups of parquet, record batches
    of arrow, documents of an embedded collection. `file` is its number among the inputs of the source."""

    file: int
    path: str
    start: int
    stop: int
    bytes: int


class Row(NamedTuple):
    """A row of a part.

    line: from 1 in the part. offset: its first byte in the (decompressed) file, or its row number in a table.
    raw: its bytes; None where only `value` is known. value: a JSON object, a table's row, or a text. fault:
    why it holds no value, `code` or `code: details`.
    """

    line: int
    offset: int
    raw: bytes | None
    value: Any
    fault: str | None


def format_of(kind: str, path: str) -> str:
    """What a file of a source is read as: jsonl, parquet, arrow, text or embedded."""
    if kind == "sft" and path in samples.COLLECTIONS:
        return "embedded"
    if kind == "sft":
        return {".parquet": "parquet", ".arrow": "arrow"}.get(Path(path).suffix, "jsonl")
    return {"hub": "arrow", "tree": "text"}.get(kind, kind)


def column_of(source: SourceConfig) -> str | None:
    """The key or column that holds a document; None where the whole row does."""
    return CHAT_KEY if source.kind == "sft" else source.text_key


def read_rows(source: SourceConfig, part: Part) -> Iterator[Row]:
    """The rows of a part, in order, blank lines included.

    Raises DataError for a file that cannot be read as what it is said to be, and for a table without the
    text column.
    """
    format = format_of(source.kind, part.path)
    with _whole(part.path, format):
        yield from _READERS[format](source, part)


def is_hub(source: SourceConfig, path: str) -> bool:
    """Whether a path of a source names a dataset of the hub."""
    return source.kind == "hub" or (source.kind == "sft" and ":" in path)


def hub_files(key: str, dataset: str) -> list[str]:
    """The arrow files of a dataset, fetched into the cache of `datasets`."""
    return [file["filename"] for file in _load_dataset(key, dataset, streaming=False).cache_files]


def hub_rows(key: str, dataset: str) -> Iterator[Row]:
    """The rows of a dataset, fetched as they are read."""
    rows = _load_dataset(key, dataset, streaming=True)
    for line, value in enumerate(rows, 1):
        yield Row(line, line - 1, None, value, None)


def _load_dataset(key: str, dataset: str, streaming: bool) -> Any:
    """A dataset NAME[@REVISION][:CONFIG]:SPLIT. Raises DataError where it cannot be had."""
    from datasets import load_dataset  # slow to import: only for those who read the hub

    name, *config, split = dataset.split(":")
    name, _, revision = name.partition("@")
    try:
        return load_dataset(name, *config, split=split, revision=revision or None, streaming=streaming)
    except Exception as error:  # the library raises whatever its many layers raise
        raise DataError(
            f"{key} cannot be loaded by datasets.load_dataset ({type(error).__name__}: {error}); check name,"
            " config, split and network. Without a network: copy the files of the dataset here and use"
            " kind=parquet, jsonl, or arrow for what datasets.save_to_disk wrote (paths=[FOLDER/*.arrow])"
        ) from error


def check_columns(name: str, source: SourceConfig, rows: Iterable[Row]) -> None:
    """Raise DataError, with the columns that there are, if none of the first rows of a source has its text
    column."""
    column = column_of(source)
    wanted: type = list if source.kind == "sft" else str
    columns: dict[str, str] = {}
    sound = (row for row in rows if row.fault is None)
    for row in itertools.islice(sound, _PROBED_ROWS) if column is not None else ():
        if isinstance(row.value.get(column), wanted):
            return
        columns |= {key: type(value).__name__ for key, value in row.value.items()}
    if columns:
        raise DataError(
            f"data.sources.{name}: its first rows have no {column!r} of type {wanted.__name__};"
            f" their columns are {', '.join(f'{k}: {v}' for k, v in columns.items())}"
        )


def _read_embedded(source: SourceConfig, part: Part) -> Iterator[Row]:
    for line, text in enumerate(samples.documents(part.path)[part.start : part.stop], 1):
        value = json.loads(text) if source.kind == "sft" else text
        yield Row(line, part.start + line - 1, None, value, None)


def _read_text(source: SourceConfig, part: Part) -> Iterator[Row]:
    raw = Path(part.path).read_bytes()
    try:
        yield Row(1, 0, raw, raw.removeprefix(_BOM).decode(), None)
    except UnicodeDecodeError as error:
        fault = f"utf8: byte {len(raw) - len(error.object) + error.start} of the file is not UTF-8"
        yield Row(1, 0, raw, None, fault)


def _read_jsonl(source: SourceConfig, part: Part) -> Iterator[Row]:
    line, end = 0, 0
    try:
        for line, offset, raw in _lines(part):
            end = offset + len(raw)
            yield _json_row(line, offset, raw)
    except (EOFError, zlib.error, OSError) as error:
        if not part.path.endswith(COMPRESSED) or getattr(error, "errno", None):
            raise
        yield Row(line + 1, end, b"", None, f"compression: the rest of the file is lost ({error})")


def _json_row(line: int, offset: int, raw: bytes) -> Row:
    value, fault = None, None
    if not raw.strip():
        return Row(line, offset, raw, None, BLANK)
    try:
        value = json.loads(raw.decode())
        if not isinstance(value, dict):
            fault = f"type: the row is of type {type(value).__name__}, not an object"
    except UnicodeDecodeError as error:
        fault = f"utf8: byte {error.start} of the row is not UTF-8"
    except (ValueError, RecursionError) as error:
        fault = f"json: {error}"
    return Row(line, offset, raw, value, fault)


def _lines(part: Part) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and bytes of the lines that begin in the part, cut at \\n only: other line separators of
    Unicode may stand in a row."""
    with _open_lines(part.path) as file:
        offset = part.start
        if part.start:  # the line that covers the byte before belongs to the part before
            file.seek(part.start - 1)
            offset += len(file.readline()) - 1
        for number in itertools.count(1):
            if offset >= part.stop and not part.path.endswith(COMPRESSED):
                return
            line = file.readline()
            if not line:
                return
            yield number, offset, line.removeprefix(_BOM) if offset == 0 else line
            offset += len(line)


@contextlib.contextmanager
def _open_lines(path: str) -> Iterator[IO[bytes]]:
    if path.endswith(".gz"):
        with gzip.open(path, "rb") as file:
            yield file  # type: ignore[misc]
    elif path.endswith(".zst"):
        import pyarrow

        with io.BufferedReader(pyarrow.input_stream(path, compression="zstd")) as file:
            yield file
    else:
        with open(path, "rb") as file:
            yield file


class _Group(NamedTuple):
    """A row group of parquet or a record batch of arrow; `read(columns=names)` its rows."""

    rows: int
    bytes: int
    read: Callable[..., Iterable["pyarrow.RecordBatch"]]


def _open_table(format: str, path: str) -> tuple["pyarrow.Schema", list[_Group]]:
    """Schema and groups of a table; arrow is the stream that `datasets` writes, or the file format."""
    import pyarrow.parquet

    if format == "parquet":
        parquet = pyarrow.parquet.ParquetFile(path)
        groups = []
        for i in range(parquet.num_row_groups):
            read = functools.partial(parquet.iter_batches, _TABLE_ROWS, [i], use_threads=False)
            group = parquet.metadata.row_group(i)
            groups.append(_Group(group.num_rows, group.total_byte_size, read))
        return parquet.schema_arrow, groups
    file = pyarrow.memory_map(path)
    is_file_format = file.read(6) == b"ARROW1"
    file.seek(0)
    table = pyarrow.ipc.open_file(file) if is_file_format else pyarrow.ipc.open_stream(file)
    batches = map(table.get_batch, range(table.num_record_batches)) if is_file_format else table
    return table.schema, [_Group(b.num_rows, b.nbytes, functools.partial(_select, b)) for b in batches]


def _select(batch: "pyarrow.RecordBatch", columns: list[str]) -> list["pyarrow.RecordBatch"]:
    return [batch.select(columns)]


def table_groups(format: str, path: str) -> list[int]:
    """Bytes of each row group of a parquet file, or record batch of an arrow file."""
    with _whole(path, format):
        return [group.bytes for group in _open_table(format, path)[1]]


def _read_table(source: SourceConfig, part: Part) -> Iterator[Row]:
    schema, groups = _open_table(format_of(source.kind, part.path), part.path)
    columns = _columns(source, part.path, schema)
    first = sum(group.rows for group in groups[: part.start])
    line = 0
    for group in groups[part.start : part.stop]:
        for batch in group.read(columns=columns):
            for start in range(0, batch.num_rows, _TABLE_ROWS):
                for value in batch.slice(start, _TABLE_ROWS).to_pylist():
                    line += 1
                    yield Row(line, first + line - 1, None, value, None)


def _columns(source: SourceConfig, path: str, schema: "pyarrow.Schema") -> list[str]:
    """The columns to read: the text, or all that a conversation may need. Raises DataError without it."""
    from pyarrow import types

    column, is_chat = column_of(source), source.kind == "sft"
    kind = schema.field(column).type if schema.names.count(column) == 1 else None
    if kind is not None and types.is_dictionary(kind):
        kind = kind.value_type
    good = (types.is_list, types.is_large_list) if is_chat else (types.is_string, types.is_large_string)
    if kind is None or not any(is_good(kind) for is_good in good):
        listed = ", ".join(f"{field.name}: {field.type}" for field in schema)
        wanted = "list" if is_chat else "text"
        raise DataError(f"{path} has no {wanted} column {column!r}; its columns are {listed}")
    return schema.names if is_chat else [str(column)]


@contextlib.contextmanager
def _whole(path: str, format: str) -> Iterator[None]:
    """Name the file in the errors of those who read it."""
    damage: tuple[type[Exception], ...] = (OSError,)
    if format in ("parquet", "arrow"):
        import pyarrow  # slow to import: only for those who read tables

        damage = (OSError, pyarrow.ArrowException)
    try:
        yield
    except damage as error:
        raise DataError(f"{path} is no whole {format} file ({error}); fetch or write it again") from error


_READERS: dict[str, Callable[[SourceConfig, Part], Iterator[Row]]] = {
    "embedded": _read_embedded,
    "jsonl": _read_jsonl,
    "parquet": _read_table,
    "arrow": _read_table,
    "text": _read_text,
}
