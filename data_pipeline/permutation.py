"""A permutation of range(n) that is computed, not stored: memory and start-up do not depend on n."""

import hashlib
from typing import TypeVar

import numpy as np

Word = TypeVar("Word", int, np.ndarray)

MASK = (1 << 64) - 1
_ROUNDS = 6


def derive_key(*parts: int | str) -> int:
    """A 64-bit key of a tuple such as (seed, "code", epoch); different tuples give unrelated keys."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def mix(word: Word) -> Word:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014), a bijection of 64-bit words (int or uint64)."""
    word = word ^ (word >> 30)
    word = (word * 0xBF58476D1CE4E5B9) & MASK
    word = word ^ (word >> 27)
    word = (word * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


class Permutation:
    """A bijection of range(n), a pure function of (n, key), for 1 <= n <= 2^62.

    A Feistel network (Luby, Rackoff 1988) permutes the next power of four. A value outside range(n) goes
    through again until it is inside ("cycle walking", Black, Rogaway 2002): fewer than 4 passes on average.
    """

    def __init__(self, n: int, key: int) -> None:
        assert 1 <= n <= 1 << 62, n
        self._n, self._half_bits = n, max(1, ((n - 1).bit_length() + 1) // 2)
        self._round_keys = [mix((key + r) & MASK) for r in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Image of one index."""
        half_mask, is_outside = (1 << self._half_bits) - 1, True
        while is_outside:
            left, right = index >> self._half_bits, index & half_mask
            for key in self._round_keys:
                left, right = right, left ^ (mix(right ^ key) & half_mask)
            index = (left << self._half_bits) | right
            is_outside = index >= self._n
        return index
