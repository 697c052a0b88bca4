"""Labels, positions and borders of rows: examples by hand, and a comparison with a slow reference."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.packing import NO_LOSS, ConcatRows, PackedRows, Row, make_plans, pack_rows

END = 9


class Stream:
    """The part of TokenStream that ConcatRows needs, in memory."""

    def __init__(self, tokens: list[int], learned: list[bool] | None = None) -> None:
        self._tokens = np.array(tokens, dtype=np.uint32)
        self._learned = np.ones(len(tokens), bool) if learned is None else np.array(learned, dtype=bool)

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._tokens[start:stop]

    def read_loss(self, start: int, stop: int) -> np.ndarray:
        return self._learned[start:stop]


def concat(
    tokens: list[int], seq_len: int, *, pad: bool = False, learned: list[bool] | None = None
) -> ConcatRows:
    return ConcatRows(Stream(tokens, learned), seq_len, END, pad=pad, fim=None)


def row(*documents: list[int], learned: list[bool] | None = None) -> Row:
    tokens = np.array([token for document in documents for token in document], dtype=np.uint32)
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    bits = np.ones(len(tokens), bool) if learned is None else np.array(learned)
    return Row(tokens, np.cumsum(lengths) - lengths, bits)


def pack(*rows: Row, seq_len: int, predict_first_token: bool = False) -> PackedRows:
    return pack_rows(list(rows), seq_len, END, predict_first_token=predict_first_token)


def test_example_by_hand() -> None:
    packed = pack(row([1, 2, END], [3, END], [END], [4]), row([5, 6, 7, 8, 1, 2, END]), seq_len=6)
    assert packed.input_ids.tolist() == [[1, 2, END, 3, END, END], [5, 6, 7, 8, 1, 2]]
    assert packed.labels.tolist() == [[2, END, NO_LOSS, END, NO_LOSS, NO_LOSS], [6, 7, 8, 1, 2, END]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert packed.cu_seqlens.tolist() == [0, 3, 5, 6, 12]
    assert packed.token_mask.all()
    kinds = [array.dtype.name for array in packed]
    assert kinds == ["int64", "int64", "int64", "int32", "bool"]


def test_padding_is_a_document_without_loss() -> None:
    packed = pack(row([1, 2, 3, 4]), row([1, END]), row(), row([1, 2, END], [3, 4, 5, 6]), seq_len=6)
    assert packed.input_ids.tolist()[:3] == [[1, 2, 3, 4, END, END], [1, END] + [END] * 4, [END] * 6]
    assert packed.labels[0].tolist() == [2, 3, 4, NO_LOSS, NO_LOSS, NO_LOSS]
    assert packed.labels[1].tolist() == [END] + [NO_LOSS] * 5
    assert packed.labels[2].tolist() == [NO_LOSS] * 6
    assert packed.token_mask.sum(axis=1).tolist() == [3, 1, 0, 6]
    assert packed.position_ids.tolist()[:3] == [[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    assert packed.cu_seqlens.tolist() == [0, 3, 6, 7, 12, 18, 21, 24]


def test_a_label_is_left_out_where_its_target_is_not_learned() -> None:
    """The bits describe targets: only the answer 3 4 is learned, not the question 1 2 nor the closing id."""
    learned = [False, False, True, True, False, False, True]
    packed = pack(row([1, 2, 3, 4, END], [5, 6], learned=learned), seq_len=8)
    assert packed.labels.tolist() == [[NO_LOSS, 3, 4, NO_LOSS, NO_LOSS, 6, NO_LOSS, NO_LOSS]]
    assert packed.token_mask.tolist() == [[True] * 6 + [False] * 2], "tokens not learned are still inputs"
    assert packed.cu_seqlens.tolist() == [0, 5, 6, 8]


def test_the_first_token_of_a_document_is_predicted_if_configured() -> None:
    documents = row([1, 2, END], [3, END], [4, END])
    apart = pack(documents, seq_len=7).labels[0].tolist()
    joined = pack(documents, seq_len=7, predict_first_token=True).labels[0].tolist()
    assert apart == [2, END, NO_LOSS, END, NO_LOSS, END, NO_LOSS]
    assert joined == [2, END, 3, END, 4, END, NO_LOSS]


@given(
    tokens=st.lists(st.integers(7, END), min_size=0, max_size=60),
    seq_len=st.integers(1, 12),
    pad=st.booleans(),
    data=st.data(),
)
def test_rows_of_a_stream_predict_every_token_once(
    tokens: list[int], seq_len: int, pad: bool, data: st.DataObject
) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    rows = concat(tokens, seq_len, pad=pad, learned=bits)
    packed = pack(*(rows.read(number) for number in range(len(rows))), row(), seq_len=seq_len)

    targets = list(zip(tokens, tokens[1:], bits[1:], strict=False))
    pairs = [(a, b if a != END and learned else NO_LOSS) for a, b, learned in targets]
    if not pad:
        pairs = pairs[: len(rows) * seq_len]
    valid = packed.token_mask.ravel()
    found = zip(packed.input_ids.ravel()[valid].tolist(), packed.labels.ravel()[valid].tolist(), strict=True)
    assert list(found) == pairs
    assert (packed.labels.ravel()[~valid] == NO_LOSS).all()
    assert rows.mean_tokens * len(rows) == pytest.approx(valid.sum())

    borders, position = [0], 0  # the slow way: walk over every token
    for number, t in itertools.product(range(len(rows) + 1), range(seq_len)):
        here, before = packed.token_mask[number, t], packed.token_mask[number, t - 1] if t else True
        new = t > 0 and ((here and packed.input_ids[number, t - 1] == END) or (before and not here))
        position = 0 if t == 0 or new else position + 1
        if t == 0 and number:
            borders.append(number * seq_len)
        if new:
            borders.append(number * seq_len + t)
        assert packed.position_ids[number, t] == position
    assert packed.cu_seqlens.tolist() == [*borders, (len(rows) + 1) * seq_len]


def test_rows_beyond_the_stream_are_empty() -> None:
    assert len(concat([], 4, pad=True)) == len(concat([1], 4, pad=True)) == 0
    assert len(concat([1] * 9, 4, pad=True)) == len(concat([1] * 9, 4)) == 2
    assert len(concat([1] * 10, 4)) == 2
    padded = concat([1] * 10, 4, pad=True)
    assert len(padded) == 3
    assert len(padded.read(2).tokens) == 2
    assert len(padded.read(7).tokens) == 0


def test_text_that_is_too_short_for_a_row_is_told(prepared, capsys):
    make_plans(prepared, 32)
    assert "too short" not in capsys.readouterr().out
    make_plans(prepared, 1 << 20)
    law = "0 rows of 1048576; its text is too short for a row: add text, or shorten stage.seq_len"
    assert capsys.readouterr().out.splitlines() == [f"  letters: {law}", f"  numbers: {law}"]
