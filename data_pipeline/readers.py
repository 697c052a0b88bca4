"""How the files of a source are cut into slices, and their rows: JSON lines, tables, text. A row that cannot
be read has a `fault`, and reading continues after it."""

import contextlib
import functools
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from data_pipeline import forms, samples
from data_pipeline.config import CHAT_KINDS, DataError, SourceConfig
from data_pipeline.files import is_address, open_file, version
from data_pipeline.manifest import InputFile

if TYPE_CHECKING:
    import pyarrow

BLANK = "blank"
_COMPRESSED = (".gz", ".zst")
_BOM = b"\xef\xbb\xbf"
_TABLE_ROWS = 1024


class Part(NamedTuple):
    """The part of a file that a slice reads: [start, stop) in bytes of JSON lines, row groups of parquet,
    record batches of arrow, or documents of an embedded collection. A file that cannot be cut is one part."""

    file: int  # its number among the inputs of the source
    path: str
    start: int
    stop: int
    bytes: int


class Row(NamedTuple):
    """A row of a part."""

    part: Part
    line: int  # counted from 1 in the part
    offset: int  # of its first byte in the (decompressed) file, or its row number in a table
    raw: bytes | None  # None if only `value` is known
    value: Any  # a JSON object, a table's row, or a text
    fault: str | None  # why the row has no value: `code` or `code: details`


def plan_slices(source: SourceConfig, inputs: list[InputFile], slice_bytes: int) -> list[list[Part]]:
    """Cut a source into slices of about `slice_bytes` (some files, such as a .gz, cannot be cut)."""
    slices: list[list[Part]] = []
    room = 0
    for number, file in enumerate(inputs):
        for part in _parts(number, file, format_of(source.kind, file.path), slice_bytes):
            if not slices or part.bytes > room:
                slices.append([])
                room = slice_bytes
            slices[-1].append(part)
            room -= part.bytes
    return slices


def read_rows(source: SourceConfig, part: Part) -> Iterator[Row]:
    """The rows of a part, in order, blank lines included. Raises DataError for a file that cannot be read in
    its format, and for a table without the text column."""
    format = format_of(source.kind, part.path)
    with _whole(part.path, format):
        if format == "embedded":
            texts = samples.documents(part.path)[part.start : part.stop]
            rows = map(json.loads, texts) if source.kind in CHAT_KINDS else texts
            yield from _numbered(part, rows, part.start)
        elif format == "text":
            value, fault = None, None
            with open_file(part.path) as file:
                raw = file.read()
            try:
                value = raw.removeprefix(_BOM).decode()
            except UnicodeDecodeError as error:
                fault = f"utf8: byte {len(raw) - len(error.object) + error.start} of the file is not UTF-8"
            yield Row(part, 1, 0, raw, value, fault)
        elif format == "jsonl":
            yield from _read_jsonl(part)
        else:
            schema, sizes, read = _open_table(format, part.path)
            batches = read(part.start, part.stop, _columns(source, part.path, schema))
            first = sum(rows for rows, _ in sizes[: part.start])
            yield from _table_rows(part, batches, first)


def file_rows(path: str) -> Iterator[Row]:
    """The rows of a file with all their columns. Raises DataError for a file that cannot be read."""
    kind, part = kind_of(path), Part(0, path, 0, version(path)[0], 0)
    if kind in ("parquet", "arrow"):
        with _whole(path, kind):
            schema, sizes, read = _open_table(kind, path)
            yield from _table_rows(part, read(0, len(sizes), schema.names), 0)
    else:
        yield from read_rows(SourceConfig(kind, [path]), part)


def kind_of(path: str) -> str:
    """The kind of source that reads a file with this name: jsonl, parquet, arrow or text."""
    suffixes = [suffix for suffix in Path(_name(path)).suffixes if suffix not in _COMPRESSED]
    kinds = {
        ".jsonl": "jsonl",
        ".ndjson": "jsonl",
        ".json": "jsonl",
        ".parquet": "parquet",
        ".arrow": "arrow",
    }
    return kinds.get(suffixes[-1], "text") if suffixes else "text"


def _name(path: str) -> str:
    """The path whose end tells the format: in lower case, and of an address without its query."""
    return (re.split("[?#]", path)[0] if path.startswith(("http://", "https://")) else path).lower()


def load_dataset(key: str, dataset: str, streaming: bool) -> Any:
    """A dataset NAME[@REVISION][:CONFIG]:SPLIT. Raises DataError if it cannot be loaded."""
    import datasets  # slow to import, and only hub datasets need it

    if ":" not in dataset:
        raise DataError(f"{key} names no split; write NAME[@REVISION][:CONFIG]:SPLIT, as in {dataset}:train")
    try:
        name, *config, split = dataset.split(":")
        name, _, revision = name.partition("@")
        return datasets.load_dataset(
            name, *config, split=split, revision=revision or None, streaming=streaming
        )
    except Exception as error:  # the library raises exceptions of many types
        what = f"{key} cannot be loaded by datasets.load_dataset ({type(error).__name__}: {error})"
        remedy = "copy the files of the dataset here and use kind=parquet, jsonl, or arrow for what"
        remedy += " datasets.save_to_disk wrote (paths=[FOLDER/*.arrow])"
        law = f"check name, config, split and network. Without a network: {remedy}"
        raise DataError(f"{what}; {law}") from error


def hub_rows(key: str, dataset: str) -> Iterator[Row]:
    """The rows of a hub dataset, downloaded while they are read."""
    return _numbered(Part(0, dataset, 0, 0, 0), load_dataset(key, dataset, streaming=True), 0)


def format_of(kind: str, path: str) -> str:
    """The format of a file of a source: jsonl, parquet, arrow, text or embedded."""
    if kind in CHAT_KINDS:
        of_suffix = {".parquet": "parquet", ".arrow": "arrow"}.get(Path(_name(path)).suffix, "jsonl")
        return "embedded" if path in samples.COLLECTIONS else of_suffix
    return {"hub": "arrow", "tree": "text"}.get(kind, kind)


def is_hub(source: SourceConfig, path: str) -> bool:
    """Whether a path of a source names a dataset of the hub."""
    return source.kind == "hub" or (source.kind in CHAT_KINDS and ":" in path and not is_address(path))


def _numbered(part: Part, values: Iterable[Any], first: int) -> Iterator[Row]:
    for line, value in enumerate(values, 1):
        yield Row(part, line, first + line - 1, None, value, None)


def _table_rows(part: Part, batches: Iterable["pyarrow.RecordBatch"], first: int) -> Iterator[Row]:
    """Converts one row at a time: programs that write tables may not check texts, and a text that is not
    UTF-8 must make only its own row a bad row. `raw` is then that text."""
    singles = (batch.slice(i, 1) for batch in batches for i in range(batch.num_rows))
    for line, single in enumerate(singles, 1):
        raw, value, fault = None, None, None
        try:
            [value] = single.to_pylist()
        except UnicodeDecodeError as error:
            raw, fault = error.object, f"utf8: byte {error.start} of the text is not UTF-8"
        except (ValueError, OverflowError) as error:  # such as a date that Python cannot represent
            raw, fault = b"", f"type: {error}"
        yield Row(part, line, first + line - 1, raw, value, fault)


def _parts(number: int, file: InputFile, format: str, slice_bytes: int) -> Iterator[Part]:
    """Pieces of at most `slice_bytes`, or of one unit that cannot be cut."""
    path, sizes = file.path, [file.bytes]
    if format == "jsonl" and not _name(path).endswith(_COMPRESSED):
        for start in range(0, file.bytes, slice_bytes):
            stop = min(start + slice_bytes, file.bytes)
            yield Part(number, path, start, stop, stop - start)
        return
    if format == "embedded":
        sizes = [len(text.encode()) for text in samples.documents(path)]
    elif format in ("parquet", "arrow"):
        with _whole(path, format):
            sizes = [bytes for _, bytes in _open_table(format, path)[1]]
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > slice_bytes:
            yield Part(number, path, start, index, total)
            start, total = index, 0
        total += size
    if sizes:
        yield Part(number, path, start, len(sizes), total)


def _read_jsonl(part: Part) -> Iterator[Row]:
    """The lines that begin in the part, cut at \\n only, as rows may hold other Unicode line separators."""
    line, offset, is_compressed = 0, part.start, _name(part.path).endswith(_COMPRESSED)
    try:
        with _open_lines(part.path) as file:
            if part.start:  # a line that contains the byte before belongs to the previous part
                file.seek(part.start - 1)
                offset += len(file.readline()) - 1
            while is_compressed or offset < part.stop:
                raw = file.readline()
                if not raw:
                    return
                line += 1
                yield _json_row(part, line, offset, raw if offset else raw.removeprefix(_BOM))
                offset += len(raw)
    except (EOFError, zlib.error, OSError) as error:
        if not is_compressed or getattr(error, "errno", None):
            raise
        if not line:  # it is not compressed at all, or lost from its first byte
            raise OSError(str(error)) from error
        yield Row(part, line + 1, offset, b"", None, f"compression: the rest of the file is lost ({error})")


@contextlib.contextmanager
def _open_lines(path: str) -> Iterator[IO[bytes]]:
    """A file without its compression."""
    with contextlib.ExitStack() as opened:
        file: Any = opened.enter_context(open_file(path))
        if _name(path).endswith(".gz"):
            file = opened.enter_context(gzip.open(file, "rb"))
        elif _name(path).endswith(".zst"):
            import pyarrow

            stream = opened.enter_context(pyarrow.input_stream(file, compression="zstd"))
            file = opened.enter_context(io.BufferedReader(stream))
        yield file


def _json_row(part: Part, line: int, offset: int, raw: bytes) -> Row:
    value, fault = None, None
    if not raw.strip():
        return Row(part, line, offset, raw, None, BLANK)
    try:
        value = json.loads(raw.decode())
        if not isinstance(value, dict):
            fault = f"type: the row is of type {type(value).__name__}, not an object"
    except UnicodeDecodeError as error:
        fault = f"utf8: byte {error.start} of the row is not UTF-8"
    except (ValueError, RecursionError) as error:
        fault = f"json: {error}"
    return Row(part, line, offset, raw, value, fault)


_Reader = Callable[[int, int, list[str]], Iterable["pyarrow.RecordBatch"]]


def _open_table(format: str, path: str) -> tuple["pyarrow.Schema", list[tuple[int, int]], _Reader]:
    """Schema, (rows, bytes) of each row group of parquet or record batch of arrow, and a function that reads
    columns of units [start, stop). Arrow: the stream format, which `datasets` writes, or the file format."""
    import pyarrow.parquet

    if format == "parquet":
        parquet = pyarrow.parquet.ParquetFile(open_file(path) if is_address(path) else path)
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
        read_groups = functools.partial(parquet.iter_batches, _TABLE_ROWS, use_threads=False)
        return parquet.schema_arrow, sizes, lambda start, stop, of: read_groups([*range(start, stop)], of)
    file = pyarrow.PythonFile(open_file(path), "r") if is_address(path) else pyarrow.memory_map(path)
    is_file_format = file.read(6) == b"ARROW1"
    file.seek(0)
    table = pyarrow.ipc.open_file(file) if is_file_format else pyarrow.ipc.open_stream(file)
    batches = [table.get_batch(i) for i in range(table.num_record_batches)] if is_file_format else list(table)

    def read(start: int, stop: int, columns: list[str]) -> list["pyarrow.RecordBatch"]:
        part = pyarrow.Table.from_batches(batches[start:stop], table.schema)
        return part.select(columns).to_batches(max_chunksize=_TABLE_ROWS)

    return table.schema, [(batch.num_rows, batch.nbytes) for batch in batches], read


def _columns(source: SourceConfig, path: str, schema: "pyarrow.Schema") -> list[str]:
    """The columns to read: the text column, or for conversations all columns. Raises DataError if there is no
    such column of text, or no form of conversations that the columns fit."""
    from pyarrow import types

    columns = {field.name: str(field.type) for field in schema}
    if source.kind in CHAT_KINDS:
        if forms.form_of(source, [name for name in columns if schema.names.count(name) == 1]) is None:
            raise DataError(f"{path}: {forms.misfit(source, columns)}")
        return schema.names
    column = source.text_column
    kind = schema.field(column).type if schema.names.count(column) == 1 else None
    kind = kind.value_type if kind is not None and types.is_dictionary(kind) else kind
    if kind is None or not (types.is_string(kind) or types.is_large_string(kind)):
        listed = ", ".join(f"{name}: {of}" for name, of in columns.items())
        remedy = "set text_key of the source to one of them"
        raise DataError(f"{path} has no text column {column!r}; its columns are {listed}; {remedy}")
    assert column is not None
    return [column]


@contextlib.contextmanager
def _whole(path: str, format: str) -> Iterator[None]:
    """Turn errors of reading into a DataError that names the file."""
    damage: tuple[type[Exception], ...] = (OSError,)
    if format in ("parquet", "arrow"):
        import pyarrow  # slow to import, and only tables need it

        damage = (OSError, pyarrow.ArrowException)
    try:
        yield
    except damage as error:
        raise DataError(f"{path} cannot be read as {format} ({error}); fetch or write it again") from error
