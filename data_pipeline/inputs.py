"""The files that a source reads, and how they are cut into slices that can be read alone."""

import glob
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from data_pipeline import samples
from data_pipeline.config import DataError, SourceConfig
from data_pipeline.readers import COMPRESSED, Part, format_of, hub_files, is_hub, table_groups

_BINARY_PROBE_BYTES = 8192


class InputFile(NamedTuple):
    """A file that is read; `mtime_ns` only saves reading it again to see that it is unchanged."""

    path: str
    bytes: int
    mtime_ns: int
    sha256: str


def list_inputs(
    name: str, source: SourceConfig, known: dict[str, InputFile], *, hashed: bool = True
) -> list[InputFile]:
    """The files of a source, in the order in which they are read; hashed, unless `known` has them at this
    size and age. A hub dataset is fetched first: it is the arrow files of the `datasets` cache.

    Raises DataError for a path that leads to no file and for a dataset that cannot be had.
    """
    found: dict[str, InputFile] = {}
    for path in source.paths:
        key = f"data.sources.{name}.paths: {path}"
        if format_of(source.kind, path) == "embedded":
            found[path] = _embedded_input(path)
            continue
        if is_hub(source, path):
            files = hub_files(key, path)
        elif source.kind == "tree":
            files = _tree_files(key, path)
        else:
            files = [file for file in sorted(glob.glob(path, recursive=True)) if os.path.isfile(file)]
            if not files:
                raise DataError(f"{key} matches no file; a folder is named as folder/**/*.EXT")
        new = [file for file in files if file not in found]
        with ThreadPoolExecutor() as pool:  # hashing lets other threads run
            inputs = pool.map(lambda file: _input(file, known.get(file), hashed), new)
            found |= dict(zip(new, inputs, strict=True))
    return list(found.values())


def plan_slices(source: SourceConfig, inputs: list[InputFile], slice_bytes: int) -> list[list[Part]]:
    """Cut a source into slices of about `slice_bytes` (what cannot be cut, as a .gz, is never split)."""
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


def _parts(number: int, file: InputFile, format: str, slice_bytes: int) -> Iterator[Part]:
    if format == "embedded":
        sizes = [len(text.encode()) for text in samples.documents(file.path)]
        yield from _grouped(number, file.path, sizes, slice_bytes)
    elif format in ("parquet", "arrow"):
        yield from _grouped(number, file.path, table_groups(format, file.path), slice_bytes)
    elif format == "jsonl" and not file.path.endswith(COMPRESSED):
        for start in range(0, file.bytes, slice_bytes):
            stop = min(start + slice_bytes, file.bytes)
            yield Part(number, file.path, start, stop, stop - start)
    else:
        yield Part(number, file.path, 0, file.bytes, file.bytes)


def _grouped(number: int, path: str, sizes: list[int], slice_bytes: int) -> Iterator[Part]:
    """Runs of neighbours of at most `slice_bytes` together, or of one."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > slice_bytes:
            yield Part(number, path, start, index, total)
            start, total = index, 0
        total += size
    if sizes:
        yield Part(number, path, start, len(sizes), total)


def _tree_files(key: str, folder: str) -> list[str]:
    """The text files below a folder; hidden ones, links and binary files are no part of a source tree."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [os.path.join(parent, name) for name in sorted(files) if not name.startswith(".")]
        found += [path for path in paths if not os.path.islink(path) and not _is_binary(path)]
    if not found:
        raise DataError(f"{key} is no folder with text files below it")
    return found


def _is_binary(path: str) -> bool:
    """As git decides it."""
    with open(path, "rb") as file:
        return b"\0" in file.read(_BINARY_PROBE_BYTES)


def _input(path: str, known: InputFile | None, hashed: bool) -> InputFile:
    status, sha256 = os.stat(path), ""
    if known is not None and (known.bytes, known.mtime_ns) == (status.st_size, status.st_mtime_ns):
        return known
    if hashed:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return InputFile(path, status.st_size, status.st_mtime_ns, sha256)


def _embedded_input(collection: str) -> InputFile:
    digest, size = hashlib.sha256(), 0
    for text in samples.documents(collection):
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
        size += len(data)
    return InputFile(collection, size, 0, digest.hexdigest())
