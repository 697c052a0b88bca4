"""What documents have in common: keys of near-duplicates, and sequences of words of texts to leave out."""

import hashlib
import re
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.config import DataError

if TYPE_CHECKING:
    import datasketch

BANDS, _ROWS = 14, 8
SHINGLE, SEQUENCE = 5, 13  # words
# Thai, kana and Chinese characters: no spaces divide their words, so that each counts as one
_ALONE = "\u0e00-\u0e7f\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
_ALONE += "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_ALONE}]|[^\\W{_ALONE}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: a power of it for each place in a sequence


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def band_keys(text: str) -> list[bytes]:
    """BANDS keys of 16 bytes; texts that share one are near-duplicates (MinHash, Broder 1997).

    Texts that have a share s of their sequences of SHINGLE words in common (the Jaccard index) share a key
    with the probability 1 - (1 - s^8)^14: 0.57 at 0.7, 0.92 at 0.8, 0.9996 at 0.9, and 0.05 at 0.5.
    Raises DataError if datasketch is not installed.
    """
    words = words_of(text)
    shingles = {" ".join(words[i : i + SHINGLE]) for i in range(max(len(words) - SHINGLE + 1, 1))}
    sketch = _empty_sketch().copy()
    # a text without words is like no other text
    sketch.update_batch([shingle.encode() for shingle in shingles] if words else [text.encode()])
    bands = sketch.hashvalues.reshape(BANDS, _ROWS)
    return [hashlib.blake2b(values.tobytes(), digest_size=16).digest() for values in bands]


@cache
def _empty_sketch() -> "datasketch.MinHash":
    try:
        import datasketch
    except ImportError as error:
        remedy = "pip install -e '.[minhash]', or use data.deduplicate=exact"
        raise DataError(f"data.deduplicate=minhash needs the package datasketch; {remedy}") from error
    return datasketch.MinHash(BANDS * _ROWS, seed=1, scheme="affine32")


class WordSequences:
    """The sequences of SEQUENCE words in some texts, as sorted hashes (arXiv 2005.14165, appendix C).

    A text with fewer words has none.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        found = [_hashes(words_of(text)) for text in texts]
        self._hashes = np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64)

    def __len__(self) -> int:
        return len(self._hashes)

    def shared_with(self, text: str) -> str | None:
        """The first sequence of words of a text that is here too, or None."""
        words = words_of(text)
        hashes = _hashes(words)
        if not len(hashes) or not len(self):
            return None
        places = np.searchsorted(self._hashes, hashes).clip(max=len(self) - 1)
        shared = np.flatnonzero(self._hashes[places] == hashes)
        return " ".join(words[shared[0] : shared[0] + SEQUENCE]) if len(shared) else None


def _hashes(words: list[str]) -> np.ndarray:
    """A hash (uint64) of each sequence of SEQUENCE words: sum of hash(word j) * _FACTOR^j modulo 2^64."""
    count = len(words) - SEQUENCE + 1
    if count < 1:
        return np.empty(0, np.uint64)
    of_words = np.array([_word_hash(word) for word in words], np.uint64)
    total, factor = np.zeros(count, np.uint64), np.uint64(1)
    with np.errstate(over="ignore"):
        for place in range(SEQUENCE):
            total += of_words[place : place + count] * factor
            factor = factor * _FACTOR
    return total


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest())
