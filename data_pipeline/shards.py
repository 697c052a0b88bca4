"""Token shards: written with a checksum per block, read by pread, checked at the start and on request.

pread and not a memory map: it is faster for rows, and a file that was cut off raises an error instead of
SIGBUS.
"""

import hashlib
import os
import random
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline.config import DataError
from data_pipeline.manifest import REMEDY, Manifest, ShardRecord, TokenizerRecord

TOKEN = np.dtype("<u4")
OFFSET = np.dtype("<u8")
ROW = np.dtype([("file", "<u4"), ("offset", "<u8")])
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
        self._files: dict[str, ChecksummedFile] = {}
        self._unwritten_loss = np.empty(0, np.bool_)  # bits that do not fill a byte yet

    def add(self, ids: np.ndarray, row: tuple[int, int], loss: np.ndarray | None = None) -> None:
        """Append one document, its closing id included. row: its input file and offset there. loss: which of
        its tokens are learned, for all documents or for none."""
        if self._files and self._offsets[-1] + len(ids) > self._capacity:
            self._finish_shard()
        self._write("tokens", ids.astype(TOKEN))
        self._write("rows", np.array(row, dtype=ROW))
        if loss is not None:
            loss = np.concatenate([self._unwritten_loss, loss])
            whole = len(loss) // 8 * 8
            self._write("loss", np.packbits(loss[:whole], bitorder="little"))
            self._unwritten_loss = loss[whole:]
        self._offsets.append(self._offsets[-1] + len(ids))

    def close(self) -> list[ShardRecord]:
        """Finish the last shard; returns all of them."""
        if self._files:
            self._finish_shard()
        return self._records

    def _write(self, suffix: str, values: np.ndarray) -> None:
        if suffix not in self._files:
            stem = f"{self._split}-{len(self._records):05d}"
            self._files[suffix] = ChecksummedFile(self._folder / f"{stem}.{suffix}")
        self._files[suffix].write(values.tobytes())

    def _finish_shard(self) -> None:
        self._write("offsets", np.array(self._offsets, dtype=OFFSET))
        if "loss" in self._files:
            self._write("loss", np.packbits(self._unwritten_loss, bitorder="little"))
        record = ShardRecord(
            name=f"{self._label}/{self._split}-{len(self._records):05d}",
            documents=len(self._offsets) - 1,
            tokens=self._offsets[-1],
            crc32={suffix: file.close() for suffix, file in self._files.items()},
        )
        self._records.append(record)
        self._files, self._offsets, self._unwritten_loss = {}, [0], np.empty(0, np.bool_)


class _ShardFiles:
    """Reads from the files of shards, few of which are open at a time."""

    def __init__(self, folder: Path, shards: list[ShardRecord]) -> None:
        self._folder, self._shards = folder, shards
        self._open: OrderedDict[tuple[int, str], int] = (
            OrderedDict()
        )  # descriptors, least recently used first

    def read(self, shard: int, suffix: str, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of a file. Raises DataError for one that is missing or was cut off."""
        record, key = self._shards[shard], (shard, suffix)
        path, _ = shard_file(self._folder, record, suffix)
        if key not in self._open:
            check_size(self._folder, record)
            if len(self._open) == _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[key] = os.open(path, os.O_RDONLY)
        self._open.move_to_end(key)
        size = dtype.itemsize
        data = read_exactly(self._open[key], path, start * size, (stop - start) * size)
        return np.frombuffer(data, dtype=dtype)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


class DocumentIndex:
    """Where the documents of one source and split begin and end, over all its shards."""

    def __init__(self, shards: list[ShardRecord], files: _ShardFiles) -> None:
        self._shards, self._files = shards, files
        self._ends = np.cumsum([shard.documents for shard in shards], dtype=np.int64)
        self._first_tokens = np.cumsum([0, *(shard.tokens for shard in shards)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def span(self, document: int) -> tuple[int, int]:
        """First token and end of a document in its stream, the closing id included."""
        shard, local = self._place(document)
        start, stop = self._files.read(shard, "offsets", OFFSET, local, local + 2).astype(np.int64)
        first = self._first_tokens[shard]
        return int(first + start), int(first + stop)

    def source_row(self, document: int) -> tuple[int, int]:
        """Number of a document's input file in the manifest, and the offset of its row there."""
        shard, local = self._place(document)
        row = self._files.read(shard, "rows", ROW, local, local + 1)[0]
        return int(row["file"]), int(row["offset"])

    def at(self, token: int) -> int:
        """The document that holds a token of the stream."""
        shard = int(np.searchsorted(self._first_tokens, token, side="right")) - 1
        record = self._shards[shard]
        offsets = self._files.read(shard, "offsets", OFFSET, 0, record.documents + 1)
        local = int(np.searchsorted(offsets, token - self._first_tokens[shard], side="right")) - 1
        return int(self._ends[shard]) - record.documents + local

    def _place(self, document: int) -> tuple[int, int]:
        """Shard of a document and its number there."""
        assert 0 <= document < len(self), (document, len(self))
        shard = int(np.searchsorted(self._ends, document, side="right"))
        return shard, document - int(self._ends[shard]) + self._shards[shard].documents


class TokenStream:
    """The tokens of one source and split, end to end over its shards, as if they were one array."""

    def __init__(self, folder: Path, shards: list[ShardRecord]) -> None:
        self._shards, self._files = shards, _ShardFiles(folder, shards)
        self._ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
        self.documents = DocumentIndex(shards, self._files)
        self.has_loss = any("loss" in shard.crc32 for shard in shards)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as uint32. Raises DataError for a shard that is missing or was cut off."""
        parts = [
            self._files.read(shard, "tokens", TOKEN, begin, end)
            for shard, begin, end in self._shard_spans(start, stop)
        ]
        return np.concatenate(parts) if parts else np.empty(0, dtype=TOKEN)

    def read_loss(self, start: int, stop: int) -> np.ndarray:
        """Which of the tokens [start, stop) are learned, as bool; all of them where no loss is kept."""
        if not self.has_loss:
            return np.ones(stop - start, dtype=np.bool_)
        parts = [np.empty(0, dtype=np.bool_)]
        for shard, begin, end in self._shard_spans(start, stop):
            packed = self._files.read(shard, "loss", np.dtype(np.uint8), begin // 8, -(-end // 8))
            bits = np.unpackbits(packed, bitorder="little")
            parts.append(bits[begin % 8 : begin % 8 + end - begin].astype(np.bool_))
        return np.concatenate(parts)

    def document_offsets(self) -> Iterator[np.ndarray]:
        """For each shard, as int64: where its documents begin in the stream, then where its last one ends."""
        for shard, (end, record) in enumerate(zip(self._ends, self._shards, strict=True)):
            offsets = self._files.read(shard, "offsets", OFFSET, 0, record.documents + 1)
            yield offsets.astype(np.int64) + (int(end) - record.tokens)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _shard_spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Shard, and first token and end within it, of the parts of [start, stop)."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self._ends[shard])
            begin = end - self._shards[shard].tokens
            part_stop = min(stop, end)
            yield shard, start - begin, part_stop - begin
            start, shard = part_stop, shard + 1


def read_exactly(descriptor: int, path: Path, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`. Raises DataError where the file ends before."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise DataError(f"{path} ends at byte {offset + len(data)}, {offset + size} are needed; {REMEDY}")
        data += more
    return data


def shard_file(folder: Path, shard: ShardRecord, suffix: str) -> tuple[Path, int]:
    """Path of a file of a shard and the size it must have."""
    size = {
        "tokens": shard.tokens * TOKEN.itemsize,
        "offsets": (shard.documents + 1) * OFFSET.itemsize,
        "rows": shard.documents * ROW.itemsize,
        "loss": -(-shard.tokens // 8),
    }[suffix]
    return folder / "slices" / f"{shard.name}.{suffix}", size


def check_size(folder: Path, shard: ShardRecord) -> None:
    """Raise DataError unless all files of a shard are there and as long as the manifest says."""
    for suffix in shard.crc32:
        path, wanted = shard_file(folder, shard, suffix)
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
        _check_block(*chance.choice(list(_blocks(folder, shard, "tokens"))))
    return manifest


def verify(folder: Path) -> Manifest:
    """Read all that the manifest commits. Raises DataError that lists every damaged file, with the offset."""
    manifest = Manifest.load(folder)
    found = []
    for name, sha256, what in (
        ("tokenizer.json", manifest.tokenizer.sha256, "the tokenizer that the data was prepared with"),
        ("rejects.jsonl", manifest.rejects_sha256, "the list of rows that were left out"),
    ):
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            found.append(f"{path} is not {what}; {REMEDY}")
    for shard in manifest.shards():
        try:
            check_size(folder, shard)
            for suffix in shard.crc32:
                for block in _blocks(folder, shard, suffix):
                    _check_block(*block)
            _check_documents(folder, shard, manifest.tokenizer)
        except DataError as error:
            found.append(str(error))
    if found:
        raise DataError("\n".join(found))
    return manifest


def _check_documents(folder: Path, shard: ShardRecord, tokenizer: TokenizerRecord) -> None:
    """Raise DataError unless the documents of a shard end where its offsets say, with known ids between."""
    tokens = np.fromfile(shard_file(folder, shard, "tokens")[0], dtype=TOKEN)
    offsets = np.fromfile(shard_file(folder, shard, "offsets")[0], dtype=OFFSET)
    ends = np.flatnonzero(tokens == tokenizer.end_of_text) + 1
    if offsets[0] != 0 or not np.array_equal(offsets[1:], ends) or tokens.max() > tokenizer.max_token_id:
        raise DataError(f"{folder}/slices/{shard.name}: tokens and offsets do not fit together; {REMEDY}")


def _blocks(folder: Path, shard: ShardRecord, suffix: str) -> Iterator[tuple[Path, int, int, int]]:
    """Path, offset, size and crc32 of each block of a file."""
    path, size = shard_file(folder, shard, suffix)
    checksums = shard.crc32[suffix]
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
