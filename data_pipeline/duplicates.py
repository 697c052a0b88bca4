"""Which documents of a source are equal to an earlier one: by 128 bits of their hash, in bounded memory."""

import hashlib
from pathlib import Path

import numpy as np

_DOCUMENTS_AT_ONCE = 1 << 26  # sorted in about 3 GB


def hash_document(data: bytes) -> bytes:
    """16 bytes, as `find_duplicates` reads them."""
    return hashlib.blake2b(data, digest_size=16).digest()


def find_duplicates(files: list[Path], at_once: int = _DOCUMENTS_AT_ONCE) -> np.ndarray:
    """Numbers (int64, ascending) of the documents equal to one before; they count over all files.

    The hashes are gone through in as many rounds, each over a range of hash values, as it takes to sort
    about `at_once` of them at a time. The result does not depend on it.
    """
    total = sum(path.stat().st_size for path in files) // 16
    rounds = -(-total // at_once)
    found = [np.empty(0, np.int64)]
    for turn in range(rounds):
        numbers, hashes, first = [], [], 0
        for path in files:
            of_file = np.fromfile(path, dtype="<u8").reshape(-1, 2)
            chosen = np.flatnonzero(of_file[:, 0] % np.uint64(rounds) == turn)
            numbers.append(chosen + first)
            hashes.append(of_file[chosen])
            first += len(of_file)
        number, key = np.concatenate(numbers), np.concatenate(hashes)
        order = np.lexsort((key[:, 1], key[:, 0]))  # stable: the first of equals stays first
        is_repeat = (key[order[1:]] == key[order[:-1]]).all(axis=1)
        found.append(number[order[1:][is_repeat]])
    return np.sort(np.concatenate(found))
