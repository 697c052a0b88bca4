"""Input files: on this machine, or at an address such as s3://bucket/file, which fsspec opens."""

import glob
import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from data_pipeline.config import DataError

if TYPE_CHECKING:
    import fsspec

_AT_ONCE = 1 << 20  # bytes of a file at an address
# what the file systems of fsspec know of the version of a file: s3, gs, hf, http, memory, ...
_VERSION = (
    *("ETag", "etag", "md5Hash", "generation", "blob_id", "Content-MD5"),
    *("Last-Modified", "LastModified", "last_modified", "mtime", "created"),
)


def is_address(path: str) -> bool:
    """Whether a path names a file system, as in s3://, gs://, hf:// and https://."""
    return "://" in path


def find(pattern: str) -> list[str]:
    """The files that a path or glob names, sorted; a path that is a file is no glob (such as a[1].txt)."""
    if not is_address(pattern):
        named = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        return [path for path in named if os.path.isfile(path)]
    with _telling(pattern):
        system, path = _open_system(pattern)
        try:
            if system.info(path)["type"] == "file":
                return [pattern]
        except FileNotFoundError as error:  # of HTTP also with a server that cannot be reached
            if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
                raise error.__cause__ from error
        found = sorted(system.glob(path, detail=True).items())
        return [system.unstrip_protocol(name) for name, info in found if info["type"] == "file"]


def version(path: str) -> tuple[int, int]:
    """The size of a file in bytes, and a number that changes when the file is written: of a file on this
    machine the time of modification in nanoseconds."""
    if not is_address(path):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    with _telling(path):
        system, inside = _open_system(path)
        system.invalidate_cache()
        info = system.info(inside)
        if info["size"] is None:
            raise DataError(f"{path}: the server does not tell its size; copy the file here")
        known = repr([info.get(key) for key in _VERSION])
        return info["size"], int.from_bytes(hashlib.blake2b(known.encode(), digest_size=7).digest())


def open_file(path: str) -> BinaryIO:
    """A file to read and seek in; of one at an address, only the parts that are read are fetched."""
    return io.BufferedReader(_Remote(path), _AT_ONCE) if is_address(path) else open(path, "rb")


class _Remote(io.RawIOBase):
    """A file at an address. Errors of its file system are a DataError, so that none looks like its end."""

    def __init__(self, address: str) -> None:
        self._address = address
        with _telling(address):
            system, path = _open_system(address)
            self._file: Any = system.open(path, "rb", block_size=_AT_ONCE)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        with _telling(self._address):
            data = self._file.read(len(buffer))
            if not data and self._file.tell() < self._file.size:
                raise DataError(f"{self._address} ends after {self._file.tell()} bytes; run again to go on")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _open_system(address: str) -> tuple["fsspec.AbstractFileSystem", str]:
    import fsspec.core  # slow to import, and only addresses need it

    return fsspec.core.url_to_fs(address)


@contextmanager
def _telling(address: str) -> Iterator[None]:
    """Turn every error of a file system into a DataError that names the address."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"{address} cannot be read: {error}; install the package") from error
    except Exception as error:  # file systems raise errors of many types
        what = f"{address} cannot be read ({type(error).__name__}: {error})"
        raise DataError(
            f"{what}; check the address, your rights there and the network, or copy the file here"
        ) from error
