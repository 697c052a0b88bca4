"""Rows of token streams, and what the model needs to know about the documents in them.

A row is at most seq_len + 1 tokens: its inputs and the targets one further.
Packing "concat": the documents of a source stand end to end, each closed by the end-of-text id; row r is the
span of seq_len + 1 tokens that starts at token r * seq_len. Documents cross the ends of rows; every token is
a target once. Packing "best_fit" is in data_pipeline.best_fit.
"""
# B rows, S seq_len, D documents, N tokens of a row

from typing import NamedTuple

import numpy as np

from data_pipeline.fim import FillInTheMiddle
from data_pipeline.shards import TokenStream
from data_pipeline.streaming import TextStream

NO_LOSS = -100
Stream = TokenStream | TextStream


class Row(NamedTuple):
    """What stands in a row, before it is padded."""

    tokens: np.ndarray  # [N] uint32, N <= S+1
    starts: np.ndarray  # [D] int64: where its documents begin
    learned: np.ndarray  # [N] bool: the tokens that are targets


class PackedRows(NamedTuple):
    """The arrays of a batch of rows."""

    input_ids: np.ndarray  # [B,S] int64
    labels: np.ndarray  # [B,S] int64: the target of position t; NO_LOSS where there is none
    position_ids: np.ndarray  # [B,S] int64, from 0 in every document and every row
    cu_seqlens: np.ndarray  # [D+1] int32: document borders over the flattened B*S tokens
    token_mask: np.ndarray  # [B,S] bool: False on padding


class ConcatRows:
    """The rows of a stream under "concat". The last tokens fill no row: they are left out, or (`pad`) get one
    with padding.
    """

    def __init__(
        self, stream: Stream, seq_len: int, end_of_text: int, *, pad: bool, fim: FillInTheMiddle | None
    ) -> None:
        self._stream, self._seq_len, self._end_of_text, self._fim = stream, seq_len, end_of_text, fim
        targets = max(len(stream) - 1, 0)
        self._rows = -(-targets // seq_len) if pad else targets // seq_len
        self.mean_tokens = min(targets / max(self._rows, 1), seq_len)  # of a row that are not padding

    def __len__(self) -> int:
        return self._rows

    def describe(self) -> str:
        """What an epoch is."""
        return f"{len(self):,} rows of {self._seq_len}"

    def places(self, row: int) -> list[tuple[Stream, int]]:
        """For each document of a row, its stream and the token there that its part begins with."""
        return [(self._stream, row * self._seq_len + start) for start in self.read(row).starts.tolist()]

    def read(self, row: int) -> Row:
        """Row number `row`; an empty one beyond the last."""
        start = min(row * self._seq_len, len(self._stream))
        stop = min(start + self._seq_len + 1, len(self._stream))
        tokens = self._stream.read(start, stop)
        starts = np.append(0, np.flatnonzero(tokens[:-1] == self._end_of_text) + 1)
        if self._fim is not None:
            documents = zip(np.split(tokens, starts[1:]), starts.tolist(), strict=True)
            tokens = np.concatenate([self._fim(ids, start + at) for ids, at in documents])
        return Row(tokens, starts, self._stream.read_loss(start, stop))


def pack_rows(rows: list[Row], seq_len: int, padding_id: int, *, predict_first_token: bool) -> PackedRows:
    """Turn rows into a batch; a short one is padded at its end.

    Padding is a document of its own, without loss. The last token of a document predicts nothing, as what
    follows is unrelated, unless `predict_first_token`.
    """
    shape = len(rows), seq_len + 1
    tokens = np.full(shape, padding_id, dtype=np.int64)
    learned, starts = np.ones(shape, dtype=np.bool_), np.zeros(shape, dtype=np.bool_)
    valid = np.zeros((len(rows), seq_len), dtype=np.bool_)  # inputs that have a next token
    for i, row in enumerate(rows):
        length = len(row.tokens)
        tokens[i, :length] = row.tokens
        valid[i, : max(length - 1, 0)] = True
        starts[i, row.starts] = True
        learned[i, :length] = row.learned

    has_label = valid & learned[:, 1:]
    if not predict_first_token:
        has_label &= ~starts[:, 1:]
    labels = np.where(has_label, tokens[:, 1:], NO_LOSS)

    borders = starts[:, :-1] & valid  # [B,S]
    borders[:, 0] = True
    borders[:, 1:] |= valid[:, :-1] & ~valid[:, 1:]
    positions = np.arange(seq_len)
    position_ids = positions - np.maximum.accumulate(np.where(borders, positions, 0), axis=1)
    cu_seqlens = np.append(np.flatnonzero(borders), borders.size).astype(np.int32)
    return PackedRows(tokens[:, :-1], labels, position_ids, cu_seqlens, valid)
