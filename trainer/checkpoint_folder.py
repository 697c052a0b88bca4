"""A checkpoint on disk: its manifest, whether it is whole, which one a run goes on from. Torch-free.

    checkpoints/step-00000150/
        manifest.json               step, position in the data, layout, size and checksum of every file
        optimizer/rank-R.safetensors  what rank R held: fp32 masters and Adam's moments, in fragments
        hf/                         the weights as a Hugging Face folder
        balance.pt random.pt        the balance's state; the random generators of all ranks

A fragment is named `PARAMETER:START:FIELD`: elements of the whole parameter, flattened,
from START on. No name depends on the layout of ranks, so that any other layout reads them.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.manifest import to_json

MANIFEST = "manifest.json"
FORMAT = "checkpoint-1"
BLOCK_BYTES = 1 << 22


class FileRecord(NamedTuple):
    """What a file must be."""

    bytes: int
    crc32: int


@dataclass(frozen=True)
class CheckpointManifest:
    """What makes a folder a checkpoint: written last, with the checksums of all else and of itself."""

    step: int
    tokens: int
    next_row: int  # first row of the data that has not been trained on
    attempt: int
    layout: dict[str, Any]  # world_size, ep_size, zero_stage, dtype; for people, resuming does not need it
    files: dict[str, FileRecord]

    def to_bytes(self) -> bytes:
        """The contents of manifest.json."""
        fields = {"format": FORMAT, **asdict(self)}
        return to_json({**fields, "crc32": zlib.crc32(to_json(fields))})

    @classmethod
    def load(cls, checkpoint: Path) -> "CheckpointManifest":
        """Raises ValueError or OSError where it is missing or damaged."""
        fields = json.loads((checkpoint / MANIFEST).read_bytes())
        if not isinstance(fields, dict) or fields.pop("crc32", None) != zlib.crc32(to_json(fields)):
            raise ValueError(f"the checksum of {MANIFEST} does not match it")
        if fields.pop("format") != FORMAT:
            raise ValueError(f"{MANIFEST} is not of format {FORMAT}")
        fields["files"] = {name: FileRecord(*entry) for name, entry in fields["files"].items()}
        return cls(**fields)

    def damage(self, checkpoint: Path, part: int = 0, parts: int = 1) -> list[str]:
        """What is wrong with the files (every `parts`-th from `part` on), one line each. Reads all bytes."""
        found = []
        for name, expected in sorted(self.files.items())[part::parts]:
            try:
                actual = measure(checkpoint / name)
            except OSError as error:
                found.append(f"{name} cannot be read ({error.strerror})")
                continue
            if actual.bytes != expected.bytes:
                found.append(f"{name} has {actual.bytes} bytes instead of {expected.bytes}")
            elif actual != expected:
                found.append(f"{name} is not what was written: its checksum differs")
        return found


def measure(path: Path) -> FileRecord:
    """Size and checksum of a file, from all its bytes."""
    size = checksum = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return FileRecord(size, checksum)


def damage(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, one line each; empty if it is whole."""
    try:
        return CheckpointManifest.load(checkpoint).damage(checkpoint)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]


def has_manifest(checkpoint: Path) -> bool:
    """Whether it looks whole, at the price of one small file."""
    try:
        CheckpointManifest.load(checkpoint)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, the one to go on from first: that which `latest` names, then newest first."""
    found = sorted((run_dir / "checkpoints").glob("step-*"), reverse=True)
    try:
        latest = (run_dir / "latest").read_text().strip()
    except OSError:
        latest = ""
    return sorted(found, key=lambda path: path.name != latest)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """While it is open, no run removes this checkpoint (or the one around this hf folder).

    It holds as far as the file system has locks between machines.
    """
    shared = folder.parent if folder.name == "hf" else folder
    descriptor = os.open(shared, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def is_read(checkpoint: Path) -> bool:
    """Whether anybody is `reading` it."""
    descriptor = os.open(checkpoint, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without such locks
        return False
    finally:
        os.close(descriptor)
    return False


class Stored(NamedTuple):
    """A tensor in a safetensors file."""

    dtype: str
    shape: list[int]
    offset: int  # of its first byte in the file
    nbytes: int


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name. Raises OSError or ValueError."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path} is no safetensors file")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Stored(entry["dtype"], entry["shape"], 8 + length + begin, end - begin)
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }
