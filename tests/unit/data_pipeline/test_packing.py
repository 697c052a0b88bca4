"""Labels, positions and borders of rows, on examples made by hand and against a slow oracle."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.packing import NO_LOSS, PackedRows, count_rows, pack_rows, row_span

END = 9


def pack(*rows: list[int], seq_len: int) -> PackedRows:
    return pack_rows([np.array(row, dtype=np.uint32) for row in rows], seq_len, END)


def test_example_by_hand() -> None:
    packed = pack([1, 2, END, 3, END, END, 4], [5, 6, 7, 8, 1, 2, END], seq_len=6)
    assert packed.input_ids.tolist() == [[1, 2, END, 3, END, END], [5, 6, 7, 8, 1, 2]]
    assert packed.labels.tolist() == [[2, END, NO_LOSS, END, NO_LOSS, NO_LOSS], [6, 7, 8, 1, 2, END]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert packed.cu_seqlens.tolist() == [0, 3, 5, 6, 12]
    assert packed.token_mask.all()
    kinds = [array.dtype.name for array in packed]
    assert kinds == ["int64", "int64", "int64", "int32", "bool"]


def test_padding_is_a_document_without_loss() -> None:
    packed = pack([1, 2, 3, 4], [1, END], [], [1, 2, END, 3, 4, 5, 6], seq_len=6)
    assert packed.input_ids.tolist()[:3] == [[1, 2, 3, 4, END, END], [1, END] + [END] * 4, [END] * 6]
    assert packed.labels[0].tolist() == [2, 3, 4, NO_LOSS, NO_LOSS, NO_LOSS]
    assert packed.labels[1].tolist() == [END] + [NO_LOSS] * 5
    assert packed.labels[2].tolist() == [NO_LOSS] * 6
    assert packed.token_mask.sum(axis=1).tolist() == [3, 1, 0, 6]
    assert packed.position_ids.tolist()[:3] == [[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    assert packed.cu_seqlens.tolist() == [0, 3, 6, 7, 12, 18, 21, 24]


@given(
    tokens=st.lists(st.integers(7, END), min_size=0, max_size=60),
    seq_len=st.integers(1, 12),
    pad=st.booleans(),
)
def test_rows_of_a_stream_predict_every_token_once(tokens: list[int], seq_len: int, pad: bool) -> None:
    rows = count_rows(len(tokens), seq_len, pad=pad)
    spans = [tokens[slice(*row_span(row, seq_len, len(tokens)))] for row in range(rows)]
    packed = pack(*spans, [], seq_len=seq_len)

    pairs = [(a, NO_LOSS if a == END else b) for a, b in itertools.pairwise(tokens)]
    if not pad:
        pairs = pairs[: rows * seq_len]
    valid = packed.token_mask.ravel()
    found = zip(packed.input_ids.ravel()[valid].tolist(), packed.labels.ravel()[valid].tolist(), strict=True)
    assert list(found) == pairs
    assert (packed.labels.ravel()[~valid] == NO_LOSS).all()

    borders, position = [0], 0  # the slow way: walk over every token
    for row in range(rows + 1):
        for t in range(seq_len):
            here, before = packed.token_mask[row, t], packed.token_mask[row, t - 1] if t else True
            new = t > 0 and ((here and packed.input_ids[row, t - 1] == END) or (before and not here))
            position = 0 if t == 0 or new else position + 1
            if new:
                borders.append(row * seq_len + t)
            assert packed.position_ids[row, t] == position
        borders.append((row + 1) * seq_len)
    assert packed.cu_seqlens.tolist() == borders


def test_rows_beyond_the_stream_are_empty() -> None:
    assert count_rows(0, 4, pad=True) == count_rows(1, 4, pad=True) == 0
    assert count_rows(9, 4, pad=False) == count_rows(9, 4, pad=True) == 2
    assert count_rows(10, 4, pad=False) == 2
    assert count_rows(10, 4, pad=True) == 3
    assert row_span(2, 4, 10) == (8, 10)
    start, stop = row_span(7, 4, 10)
    assert start == stop
