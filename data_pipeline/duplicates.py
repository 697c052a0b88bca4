"""Which documents of a source are equal to an earlier one: by 128 bits of their hash, in bounded memory."""

import hashlib
from pathlib import Path

import numpy as np

HASH_BYTES = 16
_DOCUMENTS_AT_ONCE = 1 << 26  # sorted in about 3 GB


def hash_document(data: bytes) -> bytes:
    """HASH_BYTES bytes, as `find_duplicates` reads them."""
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def find_duplicates(files: list[Path], at_once: int = _DOCUMENTS_AT_ONCE) -> np.ndarray:
    """Numbers (int64, ascending) of the documents equal to one before; they count over all files.

    The hashes are gone through in as many rounds, each over a range of hash values, as it takes to sort
    about `at_once` of them at a time. The result does not depend on it.
    """
    total = sum(path.stat().st_size for path in files) // HASH_BYTES
    rounds = np.uint64(-(-total // at_once) or 1)
    found = []
    for turn in range(int(rounds)):
        numbers, hashes = _of_round(files, turn, rounds)
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: the first of equals stays first
        is_repeat = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
        found.append(numbers[order[1:][is_repeat]])
    return np.sort(np.concatenate(found))


def _of_round(files: list[Path], turn: int, rounds: np.uint64) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [n] and hashes [n,2] of the documents whose hash falls into this round."""
    numbers, hashes, first = [np.empty(0, np.int64)], [np.empty((0, 2), np.uint64)], 0
    for path in files:
        of_file = np.fromfile(path, dtype="<u8").reshape(-1, 2)
        chosen = np.flatnonzero(of_file[:, 0] % rounds == turn)
        numbers.append(chosen + first)
        hashes.append(of_file[chosen])
        first += len(of_file)
    return np.concatenate(numbers), np.concatenate(hashes)
