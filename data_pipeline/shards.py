"""Token shards: written with a checksum per block, read by pread, checked at the start and on request.

pread and not a memory map: it is faster for rows, and a file that was cut off raises an error instead of
SIGBUS.
"""

import hashlib
import itertools
import os
import random
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline.config import DataError
from data_pipeline.manifest import REMEDY, Manifest, ShardRecord

TOKEN = np.dtype("<u4")
OFFSET = np.dtype("<u8")
_BLOCK_BYTES = 1 << 24
_OPEN_FILES = 64
_SIZES_CHECKED = 1024  # at the start; the size of every other shard is checked when it is first read
_BLOCKS_CHECKED = 3


class ChecksummedFile:
    """A file written from front to back; `close` waits for the disk and returns the crc32 of its blocks."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb")  # noqa: SIM115 (closed by close)
        self._blocks: list[int] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        """Append `data`."""
        self._file.write(data)
        while data:
            filled = self._size % _BLOCK_BYTES
            part = data[: _BLOCK_BYTES - filled]
            if filled == 0:
                self._blocks.append(0)
            self._blocks[-1] = zlib.crc32(part, self._blocks[-1])
            self._size += len(part)
            data = data[len(part) :]

    def close(self) -> str:
        """Eight hex digits per block."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return "".join(f"{block:08x}" for block in self._blocks)


class ShardWriter:
    """Writes documents into the shards `<folder>/<split>-00000`, ...; a document never crosses shards.

    `label` is the folder's final name, which the records carry.
    """

    def __init__(self, folder: Path, label: str, split: str, shard_bytes: int) -> None:
        self._folder, self._label, self._split = folder, label, split
        self._capacity = shard_bytes // TOKEN.itemsize
        self._records: list[ShardRecord] = []
        self._offsets: list[int] = [0]
        self._file: ChecksummedFile | None = None

    def add(self, ids: np.ndarray) -> None:
        """Append one document, its closing id included."""
        if self._file is not None and self._offsets[-1] + len(ids) > self._capacity:
            self._finish_shard()
        if self._file is None:
            self._file = ChecksummedFile(self._folder / f"{self._stem}.tokens")
        self._file.write(ids.astype(TOKEN).tobytes())
        self._offsets.append(self._offsets[-1] + len(ids))

    def close(self) -> list[ShardRecord]:
        """Finish the last shard; returns all of them."""
        if self._file is not None:
            self._finish_shard()
        return self._records

    @property
    def _stem(self) -> str:
        return f"{self._split}-{len(self._records):05d}"

    def _finish_shard(self) -> None:
        assert self._file is not None
        offsets = ChecksummedFile(self._folder / f"{self._stem}.offsets")
        offsets.write(np.array(self._offsets, dtype=OFFSET).tobytes())
        record = ShardRecord(
            name=f"{self._label}/{self._stem}",
            documents=len(self._offsets) - 1,
            tokens=self._offsets[-1],
            tokens_crc32=self._file.close(),
            offsets_crc32=offsets.close(),
        )
        self._records.append(record)
        self._file, self._offsets = None, [0]


class TokenStream:
    """The tokens of one source and split, end to end over its shards, as if they were one array."""

    def __init__(self, folder: Path, shards: list[ShardRecord]) -> None:
        self._folder, self._shards = folder, shards
        self._ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, least recently used first

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as uint32. Raises DataError for a shard that is missing or was cut off."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        parts = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self._ends[shard])
            begin = end - self._shards[shard].tokens
            part_stop = min(stop, end)
            parts.append(self._read_shard(shard, start - begin, part_stop - start))
            start, shard = part_stop, shard + 1
        return np.concatenate(parts) if parts else np.empty(0, dtype=TOKEN)

    def document_offsets(self) -> Iterator[np.ndarray]:
        """For each shard, as int64: where its documents begin in the stream, then where its last one ends."""
        for shard, end in zip(self._shards, self._ends, strict=True):
            path, size = offsets_file(self._folder, shard)
            check_size(self._folder, shard)
            with open(path, "rb") as file:
                offsets = np.frombuffer(read_exactly(file.fileno(), path, 0, size), dtype=OFFSET)
            yield offsets.astype(np.int64) + (int(end) - shard.tokens)

    def close(self) -> None:
        """Close the files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _read_shard(self, shard: int, start: int, count: int) -> np.ndarray:
        path, _ = tokens_file(self._folder, self._shards[shard])
        if shard not in self._open:
            check_size(self._folder, self._shards[shard])
            if len(self._open) == _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = os.open(path, os.O_RDONLY)
        self._open.move_to_end(shard)
        offset, size = start * TOKEN.itemsize, count * TOKEN.itemsize
        return np.frombuffer(read_exactly(self._open[shard], path, offset, size), dtype=TOKEN)


def read_exactly(descriptor: int, path: Path, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`. Raises DataError where the file ends before."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise DataError(f"{path} ends at byte {offset + len(data)}, {offset + size} are needed; {REMEDY}")
        data += more
    return data


def tokens_file(folder: Path, shard: ShardRecord) -> tuple[Path, int]:
    """Path of a shard's tokens and the size it must have."""
    return folder / "slices" / f"{shard.name}.tokens", shard.tokens * TOKEN.itemsize


def offsets_file(folder: Path, shard: ShardRecord) -> tuple[Path, int]:
    """Path of a shard's document offsets and the size it must have."""
    return folder / "slices" / f"{shard.name}.offsets", (shard.documents + 1) * OFFSET.itemsize


def check_size(folder: Path, shard: ShardRecord) -> None:
    """Raise DataError unless both files of a shard are there and as long as the manifest says."""
    for path, wanted in (tokens_file(folder, shard), offsets_file(folder, shard)):
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); {REMEDY}") from error
        if size != wanted:
            raise DataError(f"{path} has {size} bytes, its manifest says {wanted}; {REMEDY}")


def open_prepared(folder: Path) -> Manifest:
    """The manifest, after a look at sizes and random blocks that takes no longer for more data."""
    manifest = Manifest.load(folder)
    shards = manifest.shards()
    chance = random.Random()  # not seeded: every rank and every start looks elsewhere
    for shard in chance.sample(shards, min(len(shards), _SIZES_CHECKED)):
        check_size(folder, shard)
    for shard in chance.choices(shards, k=_BLOCKS_CHECKED):
        check_size(folder, shard)
        blocks = list(_blocks(*tokens_file(folder, shard), shard.tokens_crc32))
        _check_block(*chance.choice(blocks))
    return manifest


def verify(folder: Path) -> Manifest:
    """Read all that the manifest commits. Raises DataError that lists every damaged file, with the offset."""
    manifest = Manifest.load(folder)
    found = []
    tokenizer = folder / "tokenizer.json"
    if (
        not tokenizer.is_file()
        or hashlib.sha256(tokenizer.read_bytes()).hexdigest() != manifest.tokenizer.sha256
    ):
        found.append(f"{tokenizer} is not the tokenizer that the data was prepared with; {REMEDY}")
    for shard in manifest.shards():
        try:
            check_size(folder, shard)
            tokens = _blocks(*tokens_file(folder, shard), shard.tokens_crc32)
            offsets = _blocks(*offsets_file(folder, shard), shard.offsets_crc32)
            for block in itertools.chain(tokens, offsets):
                _check_block(*block)
        except DataError as error:
            found.append(str(error))
    if found:
        raise DataError("\n".join(found))
    return manifest


def _blocks(path: Path, size: int, checksums: str) -> Iterator[tuple[Path, int, int, int]]:
    """Path, offset, size and crc32 of each block of a file."""
    for number, offset in enumerate(range(0, size, _BLOCK_BYTES)):
        yield path, offset, min(_BLOCK_BYTES, size - offset), int(checksums[8 * number : 8 * number + 8], 16)


def _check_block(path: Path, offset: int, size: int, crc32: int) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        found = zlib.crc32(read_exactly(descriptor, path, offset, size))
    finally:
        os.close(descriptor)
    if found != crc32:
        raise DataError(
            f"{path} is damaged between bytes {offset} and {offset + size}: crc32 {found:08x},"
            f" its manifest says {crc32:08x}; {REMEDY}"
        )
