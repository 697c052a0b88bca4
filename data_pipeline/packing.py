"""Rows of a token stream, and what the model needs to know about the documents in them.

Packing "concat": the documents of a source stand end to end, each closed by the end-of-text id; row r is the
span of seq_len + 1 tokens that starts at token r * seq_len. Documents cross the ends of rows; every token is
a target once.
"""
# B rows, S seq_len, D documents

from typing import NamedTuple

import numpy as np

NO_LOSS = -100


class PackedRows(NamedTuple):
    """The arrays of a batch of rows."""

    input_ids: np.ndarray  # [B,S] int64
    labels: (
        np.ndarray
    )  # [B,S] int64: the target of position t; NO_LOSS on padding and after the end of a document
    position_ids: np.ndarray  # [B,S] int64, from 0 in every document and every row
    cu_seqlens: np.ndarray  # [D+1] int32: document borders over the flattened B*S tokens
    token_mask: np.ndarray  # [B,S] bool: False on padding


def count_rows(num_tokens: int, seq_len: int, *, pad: bool) -> int:
    """Rows of a stream. The last tokens fill no row: they are left out, or (`pad`) get a row with padding."""
    targets = max(num_tokens - 1, 0)
    return -(-targets // seq_len) if pad else targets // seq_len


def row_span(row: int, seq_len: int, num_tokens: int) -> tuple[int, int]:
    """First token and end of a row, cut off at the end of the stream; empty beyond it."""
    start = min(row * seq_len, num_tokens)
    return start, min(start + seq_len + 1, num_tokens)


def pack_rows(spans: list[np.ndarray], seq_len: int, end_of_text: int) -> PackedRows:
    """Turn spans of at most seq_len + 1 tokens into a batch; a short span is padded at its end.

    Padding is a document of its own. The last token of a document predicts nothing: what follows is
    unrelated.
    """
    tokens = np.full((len(spans), seq_len + 1), end_of_text, dtype=np.int64)
    for row, span in zip(tokens, spans, strict=True):
        row[: len(span)] = span
    lengths = np.array([[len(span) - 1] for span in spans])  # [B,1] inputs that have a target
    valid = np.arange(seq_len) < lengths  # [B,S]

    input_ids = tokens[:, :-1]
    ends = (input_ids == end_of_text) & valid
    labels = np.where(valid & ~ends, tokens[:, 1:], NO_LOSS)

    starts = np.ones_like(valid)
    padding_starts = valid[:, :-1] & ~valid[:, 1:]
    starts[:, 1:] = ends[:, :-1] | padding_starts
    positions = np.arange(seq_len)
    position_ids = positions - np.maximum.accumulate(np.where(starts, positions, 0), axis=1)
    cu_seqlens = np.append(np.flatnonzero(starts), starts.size).astype(np.int32)
    return PackedRows(input_ids, labels, position_ids, cu_seqlens, valid)
