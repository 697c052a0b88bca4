"""The verifiers that read an answer: tables of right and wrong completions."""

import importlib
from typing import Any

import pytest

from trainer.settings.rl import OPTIONS
from trainer.verifiers.verdict import answer_of, boxed


def reward(kind: str, completion: str, answer: Any, **options: Any) -> float:
    """The reward, by the part of the completion that the scorer hands to a verifier of this kind."""
    verify = importlib.import_module(f"trainer.verifiers.{kind}").verify
    read = completion if kind == "format" else answer_of(completion)
    verdict = verify({"answer": answer, "shape": "[0-9]+"}, read, {**OPTIONS[kind], **options})
    assert verdict.reason
    return verdict.reward


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("42", "42"),
        (" 42\n<|im_end|>", "42"),
        ("42<|endoftext|>", "42"),
        ("4<|im_end|>2<|im_end|>", "4<|im_end|>2"),
        ("<think>43</think>42", "42"),
        ("no opening tag 43</think>\n\n42<|im_end|>\n", "42"),
        ("<think>1</think>2<think>3</think>42", "42"),
        ("<think>never closed: 42", ""),
        ("41</think>42<think>43", ""),
        ("<|im_start|>assistant\n42", "<|im_start|>assistant\n42"),
        ("", ""),
        ("<|im_end|>", ""),
        ("<think></think>", ""),
    ],
)
def test_the_answer_is_what_follows_the_thoughts(completion: str, answer: str) -> None:
    assert answer_of(completion) == answer


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{}", ""),
        (r"\boxed 3", None),
        ("", None),
    ],
)
def test_the_last_complete_box(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


def test_many_open_boxes_take_no_square_of_time() -> None:
    assert boxed(r"\boxed{" * 200_000) is None


@pytest.mark.parametrize(
    ("completion", "answer", "options", "expected"),
    [
        ("Paris", "Paris", {}, 1),
        ("<think>Rome?</think> Paris\n<|im_end|>", " Paris ", {}, 1),
        ("42", 42, {}, 1),
        ("paris", "Paris", {}, 0),
        ("STRASSE", "straße", {"ignore_case": True}, 1),
        ("It is Paris", "Paris", {}, 0),
        ("Paris or Rome", "Paris", {}, 0),
        ("<think>Paris", "Paris", {}, 0),
        ("", "Paris", {}, 0),
        ("x" * 1_000_000, "Paris", {}, 0),
        ("7", "Paris", {"answer_key": "shape"}, 0),
        ("[0-9]+", "Paris", {"answer_key": "shape"}, 1),
    ],
)
def test_exact(completion: str, answer: Any, options: dict, expected: float) -> None:
    assert reward("exact", completion, answer, **options) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "options", "expected"),
    [
        ("so it is 42.", "42", {}, 1),
        ("1,234,567.50 dollars", 1234567.5, {}, 1),
        ("$-5$", -5, {}, 1),
        ("x = +5", 5, {}, 1),
        ("\u22125", -5, {}, 1),
        ("10-4", 4, {}, 1),
        ("10-4", -4, {}, 0),
        ("from 1, 2, 3", 3, {}, 1),
        ("1,23", 23, {}, 1),
        ("1234,567", 567, {}, 1),
        (".5", 0.5, {}, 1),
        ("1.5e3", 1500, {}, 1),
        ("2.50", "2.5", {}, 1),
        ("答案是42。", 42, {}, 1),
        (r"\boxed{42} was found in 3 steps", 42, {}, 1),
        (r"\boxed{41}, no, \boxed{1,042}", 1042, {}, 1),
        (r"\boxed{none} 42", 42, {}, 0),
        (r"\boxed{42", 42, {}, 1),
        ("#### 42", "It is 40 + 2\n#### 42", {}, 1),
        ("42 <|im_end|> 43", 42, {}, 0),
        ("<think>42", 42, {}, 0),
        ("<think>41</think>42", 42, {}, 1),
        ("４２", 42, {}, 0),
        ("٤٢", 42, {}, 0),
        ("", 42, {}, 0),
        ("no number", 42, {}, 0),
        ("nan inf 0x2a", 42, {}, 0),
        ("9" * 100_000, 42, {}, 0),
        ("1e9999", 42, {"tolerance": 1.0}, 0),
        ("0.30000001", "0.3", {}, 0),
        ("3.1415", "3.14", {"tolerance": 0.01}, 1),
        ("3.16", "3.14", {"tolerance": 0.01}, 0),
        ("3.13", "3.14", {"tolerance": 0.01}, 1),
        ("3.12", "3.14", {"tolerance": 0.01}, 0),
        ("100000000000000000000000000001", "100000000000000000000000000000", {}, 0),
    ],
)
def test_number(completion: str, answer: Any, options: dict, expected: float) -> None:
    assert reward("number", completion, answer, **options) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5", 1),
        (r"\boxed{0.5}", r"\frac12", 1),
        (r"thus $x^2+2x+1$", "(x+1)^2", 1),
        (r"\boxed{(1,2)}", "(1,2)", 1),
        (r"\boxed{\{2,1\}}", r"\{1,2\}", 1),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", 1),
        ("the answer is 42", "$42$", 1),
        (r"\boxed{41}, no, \boxed{42}", "42", 1),
        (r"\boxed{42}, no, \boxed{41}", "42", 0),
        (r"\boxed{1000}", "1,000", 1),
        (r"\boxed{x+1}", "x", 0),
        (r"\boxed{1}", "x+1", 0),
        (r"\boxed{\frac{1}{2}", "2", 0),
        (r"\boxed{}", "42", 0),
        ("<think>42", "42", 0),
        ("", "42", 0),
        ("no mathematics here", "42", 0),
        (r"\boxed{" * 500, "42", 0),
    ],
)
def test_math(completion: str, answer: str, expected: float) -> None:
    assert reward("math", completion, answer) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("Answer: B", 1),
        ("The answer is **B**.", 1),
        ("ANSWER = (B)", 1),
        (r"\boxed{B}", 1),
        (r"\boxed{\text{B}}", 1),
        (r"\boxed{(B)}", 1),
        ("It must be (B), surely.", 1),
        ("B", 1),
        ("so\n**B.**\n", 1),
        ("A\nB", 1),
        ("Answer: A, or rather, Answer: B", 1),
        ("(A) is wrong; Answer: B", 1),
        ("Answer: B. I think A dog agrees", 1),
        ("Answer: B, not (A)", 0),
        ("Answer: Because", 0),
        (r"\boxed{Both}", 0),
        ("A B", 0),
        ("b", 0),
        ("Answer: K", 0),
        ("Ｂ", 0),
        ("", 0),
        ("<think>Answer: B", 0),
        ("<think>Answer: A</think>Answer: B<|im_end|>", 1),
        ("* " * 100_000, 0),
        ("x" + "\n" * 100_000 + "x", 0),
    ],
)
def test_choice(completion: str, expected: float) -> None:
    assert reward("choice", completion, "B") == expected


@pytest.mark.parametrize(
    ("completion", "options", "expected"),
    [
        ("123", {"pattern": "[0-9]+"}, 1),
        ("a123", {"pattern": "[0-9]+"}, 0),
        ("123b", {"pattern": "[0-9]+"}, 0),
        ("a123b", {"pattern": "[0-9]+", "match": "search"}, 1),
        ("ab", {"pattern": "[0-9]+", "match": "search"}, 0),
        ("123", {"pattern_key": "shape"}, 1),
        ("abc", {"pattern_key": "shape"}, 0),
        ("<think>abc</think>123<|im_end|>", {"pattern_key": "shape"}, 1),
        ("", {"pattern": ".+"}, 0),
    ],
)
def test_regex(completion: str, options: dict, expected: float) -> None:
    assert reward("regex", completion, "", **options) == expected


@pytest.mark.parametrize(
    ("completion", "required", "optional", "forbidden"),
    [
        ("<think>a</think>b", 1, 1, 0),
        ("\n<think>\n\n</think>\n\nb<|im_end|>", 1, 1, 0),
        ("b", 0, 1, 1),
        ("b<|im_end|>", 0, 1, 1),
        ("<think>a</think>", 0, 0, 0),
        ("<think>a</think><|im_end|>", 0, 0, 0),
        ("<think>a", 0, 0, 0),
        ("a</think>b", 0, 0, 0),
        ("b<think>a</think>", 0, 0, 0),
        ("x<think>a</think>b", 0, 0, 0),
        ("<think>a</think>b</think>c", 0, 0, 0),
        ("<think>a<think>c</think>b", 0, 0, 0),
        ("<think>a</think>b<think>c</think>d", 0, 0, 0),
        ("", 0, 0, 0),
        ("<|im_end|>", 0, 0, 0),
    ],
)
def test_format(completion: str, required: float, optional: float, forbidden: float) -> None:
    for think, expected in {"required": required, "optional": optional, "forbidden": forbidden}.items():
        assert reward("format", completion, "", think=think) == expected, think


def test_format_of_the_answer() -> None:
    assert reward("format", "<think>a</think> #### 42 <|im_end|>", "", pattern="#### [0-9]+") == 1
    assert reward("format", "<think>a</think> 42 #### 42", "", pattern="#### [0-9]+") == 0


@pytest.mark.parametrize(
    ("kind", "answer", "message"),
    [
        ("exact", None, "the row has no field answer; its fields are answer, shape"),
        ("number", "no number", "answer='no number' of the row must hold one number"),
        (
            "number",
            "1/2",
            "answer='1/2' of the row must hold one number, after #### if that is there; for others",
        ),
        ("number", "10^6", "must hold one number"),
        ("number", "3,5", "must hold one number"),
        ("number", "#### 1 000", "must hold one number"),
        ("math", "", "answer='' of the row is no expression"),
        ("choice", "K", "answer='K' of the row is no letter from A to J"),
        ("choice", "BC", "answer='BC' of the row"),
    ],
)
def test_a_row_that_cannot_be_judged_is_an_error(kind: str, answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward(kind, "42", answer)
