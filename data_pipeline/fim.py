"""Fill-in-the-middle (arXiv 2207.14255): a document as prefix, suffix, middle, in that order.

It is applied to the part of a document that stands in a row ("context-level" in the paper), so no row lacks
what it is asked to fill in. The three control ids take the place of the last three tokens of the
suffix: lengths, rows and their order are those without it.
"""

import numpy as np

from data_pipeline.permutation import MASK, derive_key, mix
from data_pipeline.tokenizer import Tokenizer


class FillInTheMiddle:
    """Rearranges a share `rate` of documents; of these, `spm_share` with the suffix before the prefix.

    PSM: `<|fim_prefix|> P <|fim_suffix|> S <|fim_middle|> M`; SPM, in the paper's form for joint training:
    `<|fim_prefix|> <|fim_suffix|> S <|fim_middle|> P M`.

    Raises DataError for a tokenizer without these control tokens.
    """

    def __init__(self, rate: float, spm_share: float, tokenizer: Tokenizer, seed: int, source: str) -> None:
        self._rate, self._spm_share, self._end_of_text = rate, spm_share, tokenizer.end_of_text
        self._prefix, self._middle, self._suffix = (
            np.array([tokenizer.control_id(f"<|fim_{part}|>")], dtype=np.uint32)
            for part in ("prefix", "middle", "suffix")
        )
        self._key = derive_key(seed, "fim", source)

    def __call__(self, document: np.ndarray, position: int) -> np.ndarray:
        """`document` rearranged, or itself; its length and a closing end-of-text id stay.

        A pure function of the seed, the source and `position`, that of the document's first token in it.
        """
        word = mix((self._key + position) & MASK)
        if _uniform(word) >= self._rate:
            return document
        closed = int(len(document) > 0 and document[-1] == self._end_of_text)
        body, end = document[: len(document) - closed], document[len(document) - closed :]
        room = len(body) - 3
        if room < 1:
            return document
        word, is_spm = mix(word), _uniform(mix(word ^ 1)) < self._spm_share
        first, second = sorted((word % (room + 1), mix(word) % (room + 1)))
        prefix, middle, suffix = body[:first], body[first:second], body[second:room]
        if is_spm:
            parts = [self._prefix, self._suffix, suffix, self._middle, prefix, middle]
        else:
            parts = [self._prefix, prefix, self._suffix, suffix, self._middle, middle]
        return np.concatenate([*parts, end])


def _uniform(word: int) -> float:
    """A number in [0, 1) from 64 random bits."""
    return (word >> 11) / 2.0**53
