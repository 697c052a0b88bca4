"""The files of a source, each with its size and what tells its version."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipeline import samples
from data_pipeline.config import DataError, SourceConfig
from data_pipeline.files import find, is_address, version
from data_pipeline.manifest import InputFile, sha256_of
from data_pipeline.readers import format_of, is_hub, load_dataset

_PROBED_BYTES = 8192

Known = dict[str, InputFile]  # by path


def list_inputs(name: str, source: SourceConfig, known: Known, *, hashed: bool = True) -> list[InputFile]:
    """The files of a source, in the order in which they are read. A file is hashed unless `known` has it with
    the same size and modification time. A hub dataset is downloaded; its files are the arrow files in the
    cache of `datasets`. Raises DataError for a path without files and a dataset that cannot be loaded."""
    found: Known = {}
    for path in source.paths:
        key = f"data.sources.{name}.paths: {path}"
        if format_of(source.kind, path) == "embedded":
            found[path] = _embedded_input(path)
            continue
        if is_hub(source, path):
            files = [file["filename"] for file in load_dataset(key, path, streaming=False).cache_files]
        elif source.kind == "tree":
            files = _tree_files(key, path)
        else:
            files = _found(key, path)
        found |= _inputs([file for file in files if file not in found], known, hashed)
    return list(found.values())


def list_files(key: str, paths: list[str], known: Known) -> list[InputFile]:
    """The files of a key of paths and globs, hashed as `list_inputs` does. Raises DataError if there are
    none."""
    files = dict.fromkeys(file for path in paths for file in _found(f"{key}: {path}", path))
    return list(_inputs(list(files), known, hashed=True).values())


def _found(key: str, path: str) -> list[str]:
    if not (files := find(path)):
        raise DataError(f"{key} matches no file; for a folder use folder/**/*.EXT")
    return files


def _inputs(files: list[str], known: Known, hashed: bool) -> Known:
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        return dict(zip(files, pool.map(lambda of: _input(of, known.get(of), hashed), files), strict=True))


def _tree_files(key: str, folder: str) -> list[str]:
    """The text files below a folder, without links, binary files, and hidden files and folders."""
    if is_address(folder):
        raise DataError(f"{key} is an address; kind=tree reads folders of this machine: copy it here")
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (os.path.join(parent, name) for name in sorted(files) if not name.startswith(".")):
            if os.path.isfile(path) and not os.path.islink(path):  # reading a pipe would block
                with open(path, "rb") as file:
                    if b"\0" not in file.read(_PROBED_BYTES):  # git's test for text
                        found.append(path)
    if not found:
        raise DataError(f"{key} is not a folder with text files below it")
    return found


def _input(path: str, known: InputFile | None, hashed: bool) -> InputFile:
    size, written = version(path)
    if known is not None and (known.bytes, known.mtime_ns) == (size, written):
        return known
    hashed = hashed and not is_address(path)  # it would be fetched for this
    return InputFile(path, size, written, sha256_of(Path(path)) if hashed else "")


def _embedded_input(collection: str) -> InputFile:
    texts = [text.encode() for text in samples.documents(collection)]
    digest = hashlib.sha256(b"".join(len(data).to_bytes(8, "little") + data for data in texts))
    return InputFile(collection, sum(map(len, texts)), 0, digest.hexdigest())
