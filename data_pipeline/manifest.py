"""The prepared folder, and the manifest that marks it as complete.

    manifest.json                     written last: a folder without it is not prepared
    tokenizer.json
    slices/<source>-00000/
        train-00000.tokens            uint32 little-endian: documents end to end, each closed by <|endoftext|>
        train-00000.offsets           uint64 little-endian: where the documents begin, then the shard's end
        train-00000.rows              per document: uint32 input file, uint64 offset of its row in it
        train-00000.loss              conversations only: a bit per token, lowest bit first; 1 = learned
        train-00000.fields            prompts only: the rows as JSON (UTF-8) end to end
        train-00000.field_offsets     uint64 little-endian: where the rows of JSON begin, then the file's end
        validation-00000.tokens ...
        slice.json unigrams.npy       what the slice adds to the manifest
    rejects.jsonl                     rejected rows: file, line, offset, reason, first bytes
    packing/                          plans of best_fit, made from the shards: see best_fit.py

The tokens of a source and split are those of its shards in the order of the manifest.
"""

import hashlib
import json
import os
import re
import uuid
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.config import DataError

FORMAT = "token-shards-3"
_HEAD = b'{\n "crc32": "%08x",'  # the first key of a manifest: the checksum of all bytes after it
_HEAD_BYTES = len(_HEAD % 0)
SPLITS = ("train", "validation")
SUFFIXES = {"tokens", "offsets", "rows", "loss", "fields", "field_offsets"}  # of the files of a shard
_SHARD = re.compile(r"\w[\w-]*/\w+-\d+")
REMEDY = "move the folder away and run python -m data_pipeline again"


@dataclass
class InputFile:
    """An input file. It is not hashed again while `bytes` and `mtime_ns` are unchanged.

    mtime_ns, sha256: of a file at an address, the number of its version (`files.version`), and nothing.
    """

    path: str
    bytes: int
    mtime_ns: int
    sha256: str


@dataclass
class ShardRecord:
    """name: path below slices/, without suffix. crc32: by suffix, eight hex digits per block of the file.
    field_bytes: of the fields of prompts."""

    name: str
    documents: int
    tokens: int
    crc32: dict[str, str]
    field_bytes: int = 0


Shards = dict[str, list[ShardRecord]]  # by split


@dataclass
class SourceRecord:
    """validation_unigram_cross_entropy: nats per validation token under the (add-one) frequencies of the
    training tokens; a model that scores below it has learned more than which tokens are common."""

    shards: Shards
    skipped: dict[str, int]  # rows that were left out, by the code of the reason
    validation_unigram_cross_entropy: float | None  # None without validation tokens
    # keys of messages that are not used -> documents from rows with them (duplicates count); the commonest
    ignored: dict[str, int] = field(default_factory=dict)


@dataclass
class TokenizerRecord:
    """Identity of the tokenizer.json beside the manifest."""

    sha256: str
    vocab_size: int
    end_of_text: int


@dataclass
class Manifest:
    """The record of a prepared folder: settings, inputs, shards and their checksums. Without sources it is
    plan.json: the settings and inputs of a folder whose preparation is not complete."""

    format: str
    settings: dict[str, Any]
    inputs: dict[str, list[InputFile]]  # by source
    tokenizer: TokenizerRecord
    sources: dict[str, SourceRecord]
    rejects_sha256: str

    @staticmethod
    def load(folder: Path, name: str = "manifest.json") -> "Manifest":
        """Read manifest.json. Raises DataError if it is missing, damaged, or of another format."""
        path = folder / name
        try:
            text = path.read_bytes()
            fields = json.loads(text)
            if fields["format"] != FORMAT:
                raise DataError(f"{path}: format {fields['format']!r} is not {FORMAT!r}; {REMEDY}")
            checksum = fields.pop("crc32", None)  # None: written by an earlier version
            if checksum is not None and checksum != f"{zlib.crc32(text[_HEAD_BYTES:]):08x}":
                raise ValueError("its checksum differs")
            fields["inputs"] = {
                name: [InputFile(**file) for file in files] for name, files in fields["inputs"].items()
            }
            fields["tokenizer"] = TokenizerRecord(**fields["tokenizer"])
            for source, record in fields["sources"].items():
                record["shards"] = shards_from_json(record["shards"])
                fields["sources"][source] = SourceRecord(**record)
            return Manifest(**fields)
        except FileNotFoundError as error:
            what = "is missing: the data is not prepared; run python -m data_pipeline"
            raise DataError(f"{path} {what}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path} is damaged ({error}); {REMEDY}") from error

    def save(self, folder: Path, name: str = "manifest.json") -> None:
        """Write manifest.json, which appears only when it is complete."""
        text = to_json(self)[1:]
        write_atomically(folder / name, _HEAD % zlib.crc32(text) + text)

    def shards(self) -> list[ShardRecord]:
        return [shard for of in self.sources.values() for split in SPLITS for shard in of.shards[split]]

    def check_settings(self, settings: dict[str, Any], folder: Path) -> None:
        """Raise a DataError that lists the keys of `settings` that differ from those of the folder. A missing
        key is a null."""
        # a `kind` that is missing in `settings` belongs to a source that is no longer configured
        keys = [key for key in self.settings.keys() | settings if key in settings or key.endswith(".kind")]
        differing = [
            f"  {key}: prepared with {self.settings.get(key, 'nothing')}, now {settings.get(key, 'nothing')}"
            for key in sorted(keys)
            if self.settings.get(key) != settings.get(key)
        ]
        if differing:
            what = f"data.dir={folder} was prepared with another configuration"
            # also one that failed: other processes may still be at work on it by the first configuration
            remedy = "name another folder as data.dir, or move this one away, also after a correction"
            raise DataError("\n".join([f"{what}; {remedy}:", *differing]))


def shards_from_json(splits: dict[str, list[dict[str, Any]]]) -> Shards:
    """Raises ValueError for a name that would lead out of slices/."""
    shards = {split: [ShardRecord(**shard) for shard in splits[split]] for split in SPLITS}
    for shard in (shard for of in shards.values() for shard in of):
        if not _SHARD.fullmatch(shard.name) or not shard.crc32.keys() <= SUFFIXES:
            raise ValueError(f"{shard.name!r} with {list(shard.crc32)} is no shard of slices/")
    return shards


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: Any) -> bytes:
    """Readable JSON: equal values give the same bytes, and dataclasses become objects."""
    return (json.dumps(value, indent=1, sort_keys=True, default=vars) + "\n").encode()


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path`: after a crash the file has either all of `data` or its old content."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # another process may write it too
    try:
        partial.write_bytes(data)
    except OSError:  # such as a full disk, which it would keep full
        partial.unlink(missing_ok=True)
        raise
    replace_synced(partial, path)


def replace_synced(partial: Path, path: Path) -> None:
    """Rename a finished file to `path`, after its content is on the disk."""
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
