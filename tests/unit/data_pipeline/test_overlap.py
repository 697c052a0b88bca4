"""Near-duplicates share a key as often as the formula says; shared sequences of words are found anywhere."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.overlap import SEQUENCE, SHINGLE, WordSequences, band_keys, words_of

WORDS = [f"word{n}" for n in range(5000)]


def alike(share: float, rng: random.Random, size: int = 400) -> tuple[str, str, float]:
    """Two texts and the exact share of their sequences of five words that they have in common."""
    one = rng.choices(WORDS, k=size)
    kept = round(size * share)
    other = one[:kept] + rng.choices(WORDS, k=size - kept)
    shingles = [{tuple(words[i : i + SHINGLE]) for i in range(size - SHINGLE + 1)} for words in (one, other)]
    return " ".join(one), " ".join(other), len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])


@pytest.mark.parametrize("share", [0.2, 0.65, 0.85, 0.95])
def test_alike_texts_share_a_key_as_often_as_the_formula_says(share: float) -> None:
    rng, collisions, expected, tries = random.Random(0), 0, 0.0, 120
    for _ in range(tries):
        one, other, index = alike(share, rng)
        collisions += any(a == b for a, b in zip(band_keys(one), band_keys(other), strict=True))
        expected += 1 - (1 - index**8) ** 14
    assert abs(collisions - expected) <= 4 * max(expected * (1 - expected / tries), 0.5) ** 0.5


def test_case_and_punctuation_do_not_matter() -> None:
    one = "The quick brown fox jumps over the lazy dog, and then it sleeps."
    assert band_keys(one) == band_keys("the QUICK brown fox -- jumps over the lazy dog and then it sleeps!")
    assert band_keys(one) != band_keys(
        one + " The end came sooner than all of them had thought it would come."
    )
    assert band_keys("!!!") != band_keys("???")
    assert band_keys("one two") == band_keys("One, two.") != band_keys("two one")


def test_each_character_of_scripts_without_spaces_is_a_word() -> None:
    assert words_of("Ab1漢字、かナー・ﾅx_y กำ 𠀀") == [*("ab1", *"漢字かナーﾅ", "x_y"), *"กำ", "𠀀"]
    one = "".join(chr(0x4E00 + n) for n in random.Random(0).choices(range(2000), k=400))
    keys = zip(band_keys(one), band_keys(one[:-2] + "的是"), strict=True)
    assert any(a == b for a, b in keys), "nearly equal texts are similar"


def slow_shared(texts: list[str], text: str) -> str | None:
    known = {
        tuple(words[i : i + SEQUENCE])
        for words in map(words_of, texts)
        for i in range(len(words) - SEQUENCE + 1)
    }
    words = words_of(text)
    for i in range(len(words) - SEQUENCE + 1):
        if tuple(words[i : i + SEQUENCE]) in known:
            return " ".join(words[i : i + SEQUENCE])
    return None


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_shared_sequences_are_those_of_a_slow_search(data: st.DataObject) -> None:
    """The text holds a part of one of the texts, often just as long as a sequence, or one word shorter."""
    texts = data.draw(
        st.lists(st.lists(st.sampled_from("abcd"), min_size=15, max_size=30), min_size=1, max_size=3)
    )
    whole = data.draw(st.sampled_from(texts))
    start = data.draw(st.integers(0, len(whole) - SEQUENCE))
    size = data.draw(st.sampled_from([SEQUENCE - 1, SEQUENCE, SEQUENCE + 1]))
    before, after = (data.draw(st.lists(st.sampled_from("xy"), max_size=9)) for _ in range(2))
    text = " ".join([*before, *whole[start : start + size], *after])
    joined = [" ".join(words) for words in texts]
    assert WordSequences(joined).shared_with(text) == slow_shared(joined, text)


def test_a_sequence_of_five_words_is_not_one_of_four() -> None:
    """The two texts have the same sequences of four words."""
    assert band_keys("x y x y x") != band_keys("x y x y x y")


def test_the_place_does_not_matter_and_the_order_does() -> None:
    question = "What is the sum of all the primes that are below one hundred and ten?"
    sequences = WordSequences(["something else", question])
    shared = "what is the sum of all the primes that are below one hundred"
    assert sequences.shared_with(f"Solution book. {question.upper()} Answer 1060.") == shared
    assert sequences.shared_with(" ".join(reversed(words_of(question)))) is None
    assert sequences.shared_with(" ".join(words_of(question)[1:13])) is None, "twelve words"
    assert WordSequences([]).shared_with(question) is None
    assert len(WordSequences(["too short"])) == 0
