"""Control strings in text stay text, with trained and with given tokenizers."""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import DataError
from data_pipeline.tokenizer import (
    CONTROL_TOKENS,
    END_OF_TEXT,
    Tokenizer,
    fetch_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

SERIALIZED = train_tokenizer(["the cat sat on the mat, 1234 times\n"] * 20, 512)
TOKENIZER = Tokenizer(SERIALIZED, "trained")


@given(st.text(max_size=80))
def test_round_trip(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("control", CONTROL_TOKENS)
def test_control_strings_stay_text(control: str) -> None:
    text = f"a {control} b{control}"
    with_added = tokenizers.Tokenizer.from_str(SERIALIZED)
    control_id = with_added.token_to_id(control)
    assert control_id in with_added.encode(text).ids  # a plain tokenizer would encode it as a control token
    ids = TOKENIZER.encode(text)
    assert control_id not in ids
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.encode_batch([text, "x"]) == [ids, TOKENIZER.encode("x")]


def test_control_ids_are_decoded_by_name() -> None:
    assert TOKENIZER.decode([*TOKENIZER.encode("cat"), TOKENIZER.end_of_text]) == f"cat{END_OF_TEXT}"


def test_added_tokens_beyond_the_base_vocabulary_count() -> None:
    larger = tokenizers.Tokenizer.from_str(SERIALIZED)
    base = TOKENIZER.vocab_size
    larger.add_special_tokens(["<|later|>"])
    assert Tokenizer(larger.to_str(), "larger").vocab_size == base + 1


def test_fetch_from_folder_and_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(SERIALIZED)
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        assert fetch_tokenizer(str(place)).serialized == SERIALIZED
    assert load_tokenizer(tmp_path).vocab_size == TOKENIZER.vocab_size


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)
    for damaged in (b"{}", SERIALIZED.encode().replace(b"the", b"th\xff")):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
            load_tokenizer(tmp_path)
        with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
            fetch_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match=r"has no token <\|endoftext\|>"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str(), "bare")
    with pytest.raises(DataError, match=r"data\.tokenizer=/no/such/place"):
        fetch_tokenizer("/no/such/place")
