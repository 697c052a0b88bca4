"""Token shards: written with a checksum per block, read by pread, checked at the start and by `verify`.

pread is faster for rows than a memory map, and a truncated file raises an error instead of SIGBUS.
"""

import os
import random
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data_pipeline.config import DataError
from data_pipeline.manifest import REMEDY, Manifest, ShardRecord, TokenizerRecord, sha256_of

TOKEN = np.dtype("<u4")
OFFSET = np.dtype("<u8")
ROW = np.dtype([("file", "<u4"), ("offset", "<u8")])
_BLOCK_BYTES = 1 << 24
_OPEN_FILES = 64
_SIZES_CHECKED = 1024  # at the start; the size of every other shard is checked when it is first read
_BLOCKS_CHECKED = 3


class ShardWriter:
    """Writes documents into shards `<folder>/<split>-00000`, ...; a document never crosses shards. `label` is
    the folder's final name, which goes into the records. The caller must sync the files to the disk."""

    def __init__(self, folder: Path, label: str, split: str, shard_bytes: int) -> None:
        self._folder, self._label, self._split = folder, label, split
        self._capacity = shard_bytes // TOKEN.itemsize
        self._records: list[ShardRecord] = []
        self._begin_shard()

    def _begin_shard(self) -> None:
        self._offsets, self._field_offsets, self._loss = [0], [0], list[np.ndarray]()
        self._files = dict[str, BinaryIO]()

    def add(
        self,
        ids: np.ndarray,
        row: tuple[int, int],
        loss: np.ndarray | None = None,
        fields: bytes | None = None,
    ) -> None:
        """Append one document, its closing id included. row: its input file and the offset there. loss: which
        of its tokens are learned; fields: the JSON of its row. Given for all or for no documents."""
        if self._files and self._offsets[-1] + len(ids) > self._capacity:
            self._finish_shard()
        self._write("tokens", ids.astype(TOKEN))
        self._write("rows", np.array(row, dtype=ROW))
        if loss is not None:
            self._loss.append(loss)
        if fields is not None:
            self._write("fields", np.frombuffer(fields, dtype=np.uint8))
            self._field_offsets.append(self._field_offsets[-1] + len(fields))
        self._offsets.append(self._offsets[-1] + len(ids))

    def close(self) -> list[ShardRecord]:
        """Finish the last shard; returns the records of all shards."""
        if self._files:
            self._finish_shard()
        return self._records

    def _write(self, suffix: str, values: np.ndarray) -> None:
        if suffix not in self._files:
            name = f"{self._split}-{len(self._records):05d}.{suffix}"
            self._files[suffix] = open(self._folder / name, "xb")  # noqa: SIM115 (closed by _finish_shard)
        self._files[suffix].write(values.tobytes())

    def _finish_shard(self) -> None:
        self._write("offsets", np.array(self._offsets, dtype=OFFSET))
        if self._loss:
            self._write("loss", np.packbits(np.concatenate(self._loss), bitorder="little"))
        if "fields" in self._files:
            self._write("field_offsets", np.array(self._field_offsets, dtype=OFFSET))
        for file in self._files.values():
            file.close()
        checksums = {suffix: file_crc32(Path(file.name)) for suffix, file in self._files.items()}
        name = f"{self._label}/{self._split}-{len(self._records):05d}"
        sizes = len(self._offsets) - 1, self._offsets[-1]
        self._records.append(ShardRecord(name, *sizes, checksums, self._field_offsets[-1]))
        self._begin_shard()


class Place(NamedTuple):
    """A document of a stream, and the row that it comes from."""

    document: int  # its number
    start: int  # its first token
    stop: int
    file: int  # number of the input file in the manifest
    offset: int  # in that file


class TokenStream:
    """The tokens of one source and split, read as one array over all its shards. Keeps few files open.
    Reading raises DataError for a shard that is missing or truncated."""

    def __init__(self, folder: Path, shards: list[ShardRecord]) -> None:
        self._folder, self._shards = folder, shards
        self._ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
        self._first_documents = np.cumsum([0, *(shard.documents for shard in shards)])
        self._open = OrderedDict[tuple[int, str], int]()  # descriptors, least recently used first
        self._sound = set[tuple[int, str, int]]()  # blocks with the right checksum: shard, suffix, number
        self.has_loss = any("loss" in shard.crc32 for shard in shards)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as uint32."""
        spans = self._shard_spans(start, stop)
        parts = [self._elements(shard, "tokens", TOKEN, begin, end) for shard, begin, end in spans]
        return np.concatenate(parts) if parts else np.empty(0, dtype=TOKEN)

    def read_loss(self, start: int, stop: int) -> np.ndarray:
        """Which of the tokens [start, stop) are learned, as bool; all of them if there are no loss files."""
        if not self.has_loss:
            return np.ones(stop - start, dtype=np.bool_)
        parts = [np.empty(0, dtype=np.bool_)]
        for shard, begin, end in self._shard_spans(start, stop):
            packed = self._elements(shard, "loss", np.dtype(np.uint8), begin // 8, -(-end // 8))
            bits = np.unpackbits(packed, bitorder="little")[begin % 8 :]
            parts.append(bits[: end - begin].astype(np.bool_))
        return np.concatenate(parts)

    def document_offsets(self) -> Iterator[np.ndarray]:
        """For each shard, as int64: where its documents begin in the stream, then where its last one ends."""
        return map(self._offsets, range(len(self._shards)))

    def document_at(self, token: int) -> Place:
        """The document that holds a token of the stream."""
        shard = int(np.searchsorted(self._ends, token, side="right"))
        local = int(np.searchsorted(self._offsets(shard), token, side="right")) - 1
        return self.place_of(int(self._first_documents[shard]) + local)

    @property
    def documents(self) -> int:
        """The number of documents."""
        return int(self._first_documents[-1])

    def place_of(self, document: int) -> Place:
        """Where a document is, by its number."""
        shard, local = self._shard_of(document)
        start, stop = self._sound_elements(shard, "offsets", OFFSET, local, local + 2).tolist()
        [(file, offset)] = self._sound_elements(shard, "rows", ROW, local, local + 1).tolist()
        first = int(self._ends[shard]) - self._shards[shard].tokens
        return Place(document, first + start, first + stop, file, offset)

    def read_document(self, document: int) -> tuple[np.ndarray, bytes]:
        """The tokens of a prompt, its closing id included, and its fields as JSON. All that is read has the
        checksums of the manifest."""
        shard, local = self._shard_of(document)
        start, stop = self._sound_elements(shard, "offsets", OFFSET, local, local + 2).tolist()
        first, last = self._sound_elements(shard, "field_offsets", OFFSET, local, local + 2).tolist()
        fields = self._sound_elements(shard, "fields", np.dtype(np.uint8), first, last)
        return self._sound_elements(shard, "tokens", TOKEN, start, stop), fields.tobytes()

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _offsets(self, shard: int) -> np.ndarray:
        record = self._shards[shard]
        offsets = self._elements(shard, "offsets", OFFSET, 0, record.documents + 1)
        if _crc32(offsets.tobytes()) != record.crc32["offsets"]:  # all of the file has just been read
            path, _ = shard_file(self._folder, record, "offsets")
            raise DataError(f"{path} is damaged: its checksum is not that of its manifest; {REMEDY}")
        return offsets.astype(np.int64) + (int(self._ends[shard]) - record.tokens)

    def _shard_of(self, document: int) -> tuple[int, int]:
        """The shard of a document, and its number in it."""
        assert 0 <= document < self.documents, (document, self.documents)
        shard = int(np.searchsorted(self._first_documents, document, side="right")) - 1
        return shard, document - int(self._first_documents[shard])

    def _sound_elements(self, shard: int, suffix: str, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of a file of a shard, after a check of their blocks when first read."""
        found = self._elements(shard, suffix, dtype, start, stop)
        first, last = start * dtype.itemsize // _BLOCK_BYTES, (stop * dtype.itemsize - 1) // _BLOCK_BYTES
        for number in range(first, last + 1):
            if (shard, suffix, number) not in self._sound:
                _check_block(self._folder, self._shards[shard], suffix, number)
                self._sound.add((shard, suffix, number))
        return found

    def _shard_spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Shard, and first token and end within it, of the parts of [start, stop)."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self._ends[shard])
            begin = end - self._shards[shard].tokens
            yield shard, start - begin, min(stop, end) - begin
            start, shard = min(stop, end), shard + 1

    def _elements(self, shard: int, suffix: str, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of a file of a shard."""
        key, path = (shard, suffix), shard_file(self._folder, self._shards[shard], suffix)[0]
        if key not in self._open:
            check_size(self._folder, self._shards[shard])
            if len(self._open) == _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[key] = os.open(path, os.O_RDONLY)
        self._open.move_to_end(key)
        offset, end, data = start * dtype.itemsize, stop * dtype.itemsize, b""
        while offset + len(data) < end:
            more = os.pread(self._open[key], end - offset - len(data), offset + len(data))
            if not more:
                raise DataError(f"{path} ends at byte {offset + len(data)}, {end} are needed; {REMEDY}")
            data += more
        return np.frombuffer(data, dtype=dtype)


def shard_file(folder: Path, shard: ShardRecord, suffix: str) -> tuple[Path, int]:
    """Path of a file of a shard and the size it must have."""
    sizes = {"tokens": shard.tokens * TOKEN.itemsize, "offsets": (shard.documents + 1) * OFFSET.itemsize}
    sizes |= {"rows": shard.documents * ROW.itemsize, "loss": -(-shard.tokens // 8)}
    sizes |= {"fields": shard.field_bytes, "field_offsets": (shard.documents + 1) * OFFSET.itemsize}
    return folder / "slices" / f"{shard.name}.{suffix}", sizes[suffix]


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
    """The manifest, after a check of sizes and random blocks whose cost does not grow with the data."""
    manifest = Manifest.load(folder)
    shards, chance = manifest.shards(), random.Random()  # not seeded: every rank and start checks others
    blocks = chance.choices(shards, k=_BLOCKS_CHECKED)
    for shard in [*chance.sample(shards, min(len(shards), _SIZES_CHECKED)), *blocks]:
        check_size(folder, shard)
    for shard in blocks:
        _check_block(folder, shard, "tokens", chance.randrange(len(shard.crc32["tokens"]) // 8))
    return manifest


def verify(folder: Path) -> Manifest:
    """Read and check a prepared folder. Raises a DataError that lists all damaged files, with the offsets."""
    manifest = Manifest.load(folder)
    found = []
    for name, sha256, what in (
        ("tokenizer.json", manifest.tokenizer.sha256, "the tokenizer that the data was prepared with"),
        ("rejects.jsonl", manifest.rejects_sha256, "the list of rows that were left out"),
    ):
        path = folder / name
        if not path.is_file() or sha256_of(path) != sha256:
            found.append(f"{path} is not {what}; {REMEDY}")
    for shard in manifest.shards():
        try:
            check_size(folder, shard)
            for suffix, checksums in shard.crc32.items():
                for number in range(len(checksums) // 8):
                    _check_block(folder, shard, suffix, number)
            _check_documents(folder, shard, manifest.tokenizer)
        except DataError as error:
            found.append(str(error))
    for path in sorted((folder / "packing").glob("*.npz")):
        try:
            wanted = str(read_arrays(path)["items_crc32"])
            is_whole = file_crc32(path.with_suffix(".items")) == wanted
        except (OSError, ValueError, KeyError):
            is_whole = False
        if not is_whole:
            found.append(f"{path} or its .items is damaged; remove both, they will be made again")
    if found:
        raise DataError("\n".join(found))
    return manifest


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file. Raises ValueError, with the reason, if it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as file:  # numpy checks no array that is said to be shorter than it is
            damaged = file.testzip()
        with np.load(path) as arrays:
            found = dict(arrays.items())
    except Exception as error:  # both raise exceptions of many types for a damaged file
        raise ValueError(str(error)) from error
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} in it differs")
    return found


def _check_documents(folder: Path, shard: ShardRecord, tokenizer: TokenizerRecord) -> None:
    """Raise DataError unless documents end where the offsets say and all ids are in the vocabulary."""
    tokens = np.fromfile(shard_file(folder, shard, "tokens")[0], dtype=TOKEN)
    offsets = np.fromfile(shard_file(folder, shard, "offsets")[0], dtype=OFFSET)
    ends = np.flatnonzero(tokens == tokenizer.end_of_text) + 1
    if offsets[0] != 0 or not np.array_equal(offsets[1:], ends) or tokens.max() >= tokenizer.vocab_size:
        raise DataError(f"{folder}/slices/{shard.name}: tokens and offsets do not fit together; {REMEDY}")


def _check_block(folder: Path, shard: ShardRecord, suffix: str, number: int) -> None:
    """Raise DataError unless a block of a file of a shard has the checksum of the manifest."""
    path, size = shard_file(folder, shard, suffix)
    start, wanted = number * _BLOCK_BYTES, shard.crc32[suffix][8 * number : 8 * number + 8]
    if (found := _block_crc32(path, start)) != wanted:
        what = f"{path} is damaged between bytes {start} and {min(start + _BLOCK_BYTES, size)}"
        raise DataError(f"{what}: crc32 {found}, its manifest says {wanted}; {REMEDY}")


def file_crc32(path: Path) -> str:
    """The crc32 of each block of a file, as eight hex digits per block."""
    return "".join(_block_crc32(path, start) for start in range(0, path.stat().st_size, _BLOCK_BYTES))


def _crc32(data: bytes) -> str:
    """The same of the content of a file."""
    starts = range(0, len(data), _BLOCK_BYTES)
    return "".join(f"{zlib.crc32(data[start : start + _BLOCK_BYTES]):08x}" for start in starts)


def _block_crc32(path: Path, offset: int) -> str:
    with open(path, "rb") as file:
        file.seek(offset)
        return f"{zlib.crc32(file.read(_BLOCK_BYTES)):08x}"
