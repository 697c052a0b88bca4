"""A checkpoint on disk: its files, whether it is whole, and the lock that readers hold. Torch-free.

    checkpoints/step-00000150/
        manifest.json               step, position in the data, layout, size and checksum of every file
        optimizer/rank-R.safetensors  what rank R held: fp32 masters and Adam's moments, in fragments
        hf/                         the weights as a Hugging Face folder
        balance.pt random.pt        the balance's state; the random generators of all ranks

A fragment named `PARAMETER:START:FIELD` holds elements of the flattened whole parameter, from index
START on. Names do not depend on the layout of ranks, so that any other layout can read them.
"""

import fcntl
import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from trainer.settings.run_folder import read_manifest

BLOCK_BYTES = 1 << 22


def measure(path: Path) -> list[int]:
    """Size and crc32 of a file, from all its bytes, after flushing them to the disk."""
    size = checksum = 0
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        while block := file.read(BLOCK_BYTES):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def damage(checkpoint: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint, one line each; empty if it is whole.

    Reads every `parts`-th file, starting with number `part`, so that ranks can share the work.
    """
    try:
        files = read_manifest(checkpoint)["files"]
    except ValueError as error:
        return [str(error)]
    found = []
    for name, (size, checksum) in sorted(files.items())[part::parts]:
        try:
            actual = measure(checkpoint / name)
            if actual[0] != size:
                found.append(f"{name} has {actual[0]} bytes instead of {size}")
            elif actual[1] != checksum:
                found.append(f"{name} is not what was written: its checksum differs")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Inside, no run removes this checkpoint (or the checkpoint that contains this hf folder).

    Between machines, this works only if the file system supports locks between them.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            descriptor = os.open(folder.parent if folder.name == "hf" else folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield


def is_read(checkpoint: Path) -> bool:
    """Whether any process is `reading` it; False if the file system has no such locks."""
    descriptor = os.open(checkpoint, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(descriptor)
    return False
