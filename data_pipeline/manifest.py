"""The prepared folder and the manifest that commits it.

    manifest.json                     written last: a folder without it is not prepared
    tokenizer.json
    slices/<source>-00000/
        train-00000.tokens            uint32 little-endian: documents end to end, each closed by <|endoftext|>
        train-00000.offsets           uint64 little-endian: where the documents begin, then the shard's end
        train-00000.rows              per document: uint32 input file, uint64 offset of its row in it
        train-00000.loss              conversations only: a bit per token, lowest first: is it learned?
        validation-00000.tokens ...
        slice.json unigrams.npy       what the slice adds to the manifest
    rejects.jsonl                     rows that are no documents: file, line, offset, reason, first bytes

The tokens of a source and split are those of its shards in the order of the manifest.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.config import DataError

FORMAT = "token-shards-2"
SPLITS = ("train", "validation")
REMEDY = "move the folder away and run python -m data_pipeline again"


@dataclass
class ShardRecord:
    """name: path below slices/, without suffix. crc32: by suffix, eight hex digits per block of the file."""

    name: str
    documents: int
    tokens: int
    crc32: dict[str, str]


@dataclass
class SplitRecord:
    """A source's part of a split: documents, tokens (closing ids included), bytes of UTF-8 text."""

    documents: int
    tokens: int
    bytes: int
    shards: list[ShardRecord]


@dataclass
class SourceRecord:
    """skipped: rows that were left out, by the code of the reason; `rejected` of them were bad.

    unigram_entropy: nats per training token under their own frequencies.

    validation_unigram_cross_entropy: nats per validation token under the (add-one) frequencies of the
    training tokens; a model that scores below it has learned more than which tokens are common. None without
    validation tokens.
    """

    splits: dict[str, SplitRecord]
    skipped: dict[str, int]
    rejected: int
    unigram_entropy: float
    validation_unigram_cross_entropy: float | None


@dataclass
class TokenizerRecord:
    """Identity of the tokenizer.json beside the manifest; `max_token_id` is the largest id in any shard."""

    sha256: str
    vocab_size: int
    end_of_text: int
    max_token_id: int


@dataclass
class Manifest:
    """The commit record: what was prepared, from what, and how to know that it is unharmed."""

    format: str
    settings: dict[str, Any]
    inputs: dict[str, list[dict[str, Any]]]
    tokenizer: TokenizerRecord
    sources: dict[str, SourceRecord]
    rejects_sha256: str

    @staticmethod
    def load(folder: Path) -> "Manifest":
        """Read manifest.json. Raises DataError where it is missing, damaged, or of another format."""
        path = folder / "manifest.json"
        try:
            fields = json.loads(path.read_bytes())
            if fields["format"] != FORMAT:
                raise DataError(f"{path}: format {fields['format']!r} is not {FORMAT!r}; {REMEDY}")
            fields["tokenizer"] = TokenizerRecord(**fields["tokenizer"])
            for name, record in fields["sources"].items():
                record["splits"] = {split: split_record(record["splits"][split]) for split in SPLITS}
                fields["sources"][name] = SourceRecord(**record)
            return Manifest(**fields)
        except FileNotFoundError as error:
            raise DataError(
                f"{path} is missing: the data is not prepared; run python -m data_pipeline"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}); {REMEDY}") from error

    def save(self, folder: Path) -> None:
        """Write manifest.json, all of it or nothing."""
        write_atomically(folder / "manifest.json", to_json(asdict(self)))

    def shards(self) -> list[ShardRecord]:
        """Every shard of the folder."""
        return [
            shard
            for source in self.sources.values()
            for split in SPLITS
            for shard in source.splits[split].shards
        ]

    def check_vocab_size(self, vocab_size: int) -> None:
        """Raise DataError if the data may hold an id that a model of this vocabulary has no embedding for."""
        if self.tokenizer.vocab_size > vocab_size:
            raise DataError(
                f"model.vocab_size={vocab_size} is smaller than the tokenizer of the data, which has"
                f" {self.tokenizer.vocab_size} ids (largest in use: {self.tokenizer.max_token_id});"
                " raise model.vocab_size, or prepare with another tokenizer"
            )

    def check_settings(self, settings: dict[str, Any], folder: Path) -> None:
        """Raise DataError that lists the keys of `settings` which the folder was not prepared with."""
        recorded = {
            key: value for key, value in self.settings.items() if key in settings or ".sources." in key
        }
        if lines := differing_settings(recorded, settings):
            raise DataError(
                "\n".join(
                    [
                        f"data.dir={folder} was prepared with another configuration; prepare into another:",
                        *lines,
                    ]
                )
            )


def split_record(fields: dict[str, Any]) -> SplitRecord:
    """A SplitRecord from its JSON object."""
    return SplitRecord(**{**fields, "shards": [ShardRecord(**shard) for shard in fields["shards"]]})


def differing_settings(recorded: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """One line for each key that two flat configurations do not share."""
    return [
        f"  {key}: prepared with {recorded.get(key, 'nothing')}, now {wanted.get(key, 'nothing')}"
        for key in sorted(recorded.keys() | wanted.keys())
        if recorded.get(key, KeyError) != wanted.get(key, KeyError)
    ]


def to_json(value: Any) -> bytes:
    """Readable JSON, the same bytes for equal values."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def write_atomically(path: Path, data: bytes) -> None:
    """Make `path` hold `data`: after a crash it holds all of it or is as before."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in the folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
