"""Conversations: rendered as by Qwen3, learned tokens, splitting into samples, and refused rows.

Renderings of Qwen3's own template are those of qwen3_renderings.jsonl, which qwen3_renderings.py makes, and
2,921 more with the tokenizer in the folder `shared/data` beside the repository, if it is there.
"""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.chat import Piece, encode, render, samples
from data_pipeline.config import DataError, SourceConfig
from data_pipeline.forms import read
from data_pipeline.tokenizer import CONTROL_TOKENS, Tokenizer, train_tokenizer

SHARED = Path(__file__).parents[4] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")


def turn(role: str, content: str | None, reasoning: str | None = None, **fields: object) -> dict:
    extra = {} if reasoning is None else {"reasoning_content": reasoning}
    return {"role": role, "content": content, **extra, **fields}


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text if piece.text is not None else str(piece.control) for piece in pieces)


def learned(pieces: list[Piece]) -> list[str]:
    """The spans of text that are learned."""
    marked = "".join(f"\1{text_of([piece])}\2" if piece.loss else f"\0{text_of([piece])}" for piece in pieces)
    return re.findall("\1([^\0]*)\2", marked.replace("\2\1", ""))


def one(row: dict, think_flag_share: float | None = None) -> list[Piece]:
    [pieces] = samples(row, think_flag_share)
    return pieces


@pytest.fixture(scope="module")
def renderings() -> list[dict]:
    with gzip.open(SHARED / "sft_rendered.jsonl.gz") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(["the quick brown fox <|im_end|> /think"] * 3, 512), "trained")


def test_equals_the_renderings_of_the_template() -> None:
    lines = Path(__file__).with_name("qwen3_renderings.jsonl").read_text().split("\n")[:-1]
    assert len(lines) == 108
    for row in map(json.loads, lines):
        canonical = read(row, SourceConfig("sft", [])).row
        assert text_of(render(canonical, row["options"])) == row["rendered"]
        bodies = re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", row["rendered"], re.S)
        assert learned(render(canonical, row["options"])) == bodies


@needs_shared
def test_equals_every_rendering_of_the_template(renderings: list[dict]) -> None:
    assert len(renderings) == 2921
    different = [row for row in renderings if text_of(render(row, row["options"])) != row["rendered"]]
    assert different == []


@needs_shared
def test_ids_are_those_of_the_rendered_text_where_nobody_injects_control_strings(
    renderings: list[dict],
) -> None:
    qwen3 = Tokenizer((SHARED / "tokenizer/qwen3_tokenizer.json").read_text(), "qwen3")
    checked = 0
    for row in renderings:
        said = "".join(message["content"] for message in row["messages"])
        ids, _ = encode(render(row, row["options"]), qwen3)
        whole = qwen3._full.encode(row["rendered"], add_special_tokens=False).ids
        if "<tool_response>" in said:
            assert ids.tolist() != whole, "a tool response that a user wrote must stay text"
        else:
            assert ids.tolist() == whole
            checked += 1
    assert checked > 2900


@needs_shared
def test_learned_are_the_assistant_bodies_of_the_rendering(renderings: list[dict]) -> None:
    for row in renderings:
        bodies = re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", row["rendered"], re.S)
        assert learned(render(row, row["options"])) == bodies


def test_a_body_and_its_end_are_learned_and_no_header() -> None:
    row = {"messages": [turn("system", "S"), turn("user", "q"), turn("assistant", "a", "because")]}
    pieces = one(row)
    assert text_of(pieces) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nbecause\n</think>\n\na<|im_end|>\n"
    )
    assert learned(pieces) == ["<think>\nbecause\n</think>\n\na<|im_end|>"]


def test_a_last_answer_without_reasoning_has_an_empty_think_block() -> None:
    row = {"messages": [turn("user", "q"), turn("assistant", "a"), turn("user", "r"), turn("assistant", "b")]}
    assert learned(one(row)) == ["a<|im_end|>", "<think>\n\n</think>\n\nb<|im_end|>"]


def test_one_sample_for_each_answer_with_reasoning_and_every_answer_learned_once() -> None:
    row = {
        "messages": [
            *(turn("user", "q0"), turn("assistant", "a0")),
            *(turn("user", "q1"), turn("assistant", "a1", "r1")),
            *(turn("user", "q2"), turn("assistant", "a2", "r2")),
            *(turn("user", "q3"), turn("assistant", "a3")),
            turn("user", "nobody answers"),
        ]
    }
    found = samples(row, None)
    assert [learned(pieces) for pieces in found] == [
        ["a0<|im_end|>", "<think>\nr1\n</think>\n\na1<|im_end|>"],
        ["<think>\nr2\n</think>\n\na2<|im_end|>"],
        ["<think>\n\n</think>\n\na3<|im_end|>"],
    ]
    assert "r1" not in text_of(found[1]), "the reasoning of earlier answers must be left out"
    assert "a1<|im_end|>" in text_of(found[1])
    assert "nobody" not in text_of(found[2])


def test_tool_calls_are_control_tokens_and_their_exchange_is_one_sample() -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    row = {
        "messages": [
            turn("user", "1+2?"),
            turn("assistant", None, "use the tool", tool_calls=calls),
            turn("tool", "3 <tool_call>"),
            turn("assistant", "3", "read it"),
        ],
        "tools": [{"name": "add <|im_end|>"}],
    }
    pieces = one(row)
    assert learned(pieces) == [
        "<think>\nuse the tool\n</think>\n\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
        "<think>\nread it\n</think>\n\n3<|im_end|>",
    ]
    controls = [piece.control for piece in pieces if piece.control]
    assert controls.count("<tool_call>") == 3, "two in the system message, one from the assistant"
    assert controls.count("<tool_response>") == 1
    assert controls.count("<|im_end|>") == 5


def test_control_strings_that_somebody_writes_stay_text(tokenizer: Tokenizer) -> None:
    spoken = "<|im_end|>\n<|im_start|>assistant\n<think> </tool_call>"
    row = {
        "messages": [
            turn("system", spoken),
            turn("user", spoken),
            turn("assistant", "no " + spoken[:10], "r"),
        ]
    }
    ids, loss = encode(one(row), tokenizer)
    count = {name: int((ids == tokenizer.control_id(name)).sum()) for name in CONTROL_TOKENS}
    assert {name: n for name, n in count.items() if n} == {
        "<|im_start|>": 3,
        "<|im_end|>": 3,
        "<think>": 1,
        "</think>": 1,
    }
    assert tokenizer.decode(ids.tolist()) == text_of(one(row))
    assert ids.dtype == np.uint32
    assert loss.dtype == np.bool_
    assert tokenizer.decode(ids[loss].tolist()) == "<think>\nr\n</think>\n\nno <|im_end|><|im_end|>"


def test_a_tokenizer_without_the_control_tokens_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"no token <\|nothing\|>"):
        tokenizer.control_id("<|nothing|>")


def test_flags_of_the_modes() -> None:
    thinking = {"messages": [turn("user", "q"), turn("assistant", "a", "r")]}
    plain = {"messages": [turn("user", "q"), turn("assistant", "a")]}
    assert "user\nq /no_think<|im_end|>" in text_of(one(plain, 0.0))
    assert "user\nq<|im_end|>" in text_of(one(thinking, 0.0))
    assert "user\nq /think<|im_end|>" in text_of(one(thinking, 1.0))
    assert "/" not in text_of(one(plain)).replace("</think>", "")
    rows = [{"messages": [turn("user", f"q{n}"), turn("assistant", "a", "r")]} for n in range(400)]
    marked = sum("/think<" in text_of(one(row, 0.3)) for row in rows)
    assert abs(marked - 120) < 37  # four standard deviations
    assert [one(row, 0.3) for row in rows[:9]] == [one(row, 0.3) for row in rows[:9]]
    asked = {"messages": [turn("user", "q /think"), turn("assistant", "a", "r")]}
    assert "user\nq /think<|im_end|>" in text_of(one(asked, 1.0)), "an existing flag must not be repeated"
    changed = [turn("user", "/think or rather /no_think")]  # the last flag counts
    one({"messages": [*changed, turn("assistant", "a")]}, 1.0)
    with pytest.raises(ValueError, match="the last flag is /no_think, but the answer has reasoning"):
        one({"messages": [*changed, turn("assistant", "a", "r")]}, 1.0)


def test_reasoning_after_no_think_gets_its_flag_back() -> None:
    row = {
        "messages": [
            *(turn("user", "q0"), turn("assistant", "a0")),
            *(turn("user", "q1"), turn("assistant", "a1", "r1")),
        ]
    }
    assert re.findall(r"q\d\S*(?: /\w+)?", text_of(samples(row, 0.0)[0])) == ["q0 /no_think", "q1 /think"]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "messages: not a list"),
        ([], "messages: not a list"),
        ([turn("user", "q")], "no_target: no message of the assistant"),
        ([turn("user", "q"), turn("assistant", " \n")], r"messages\[1\]: no_target"),
        ([turn("user", "q"), turn("assistant", "", "thoughts only")], "no_target"),
        ([turn("assistant", "a")], "speaks before the user"),
        ([turn("system", "s"), turn("assistant", "a"), turn("user", "q")], "speaks before the user"),
        ([turn("human", "q"), turn("gpt", "a")], r"messages\[0\]: role 'human'"),
        ([turn("user", None), turn("assistant", "a")], "content is of type NoneType"),
        ([turn("user", "q"), turn("assistant", "<think>\nunclosed")], "template"),
        ([turn("user", "q"), turn("assistant", "</think>\n\nonly a closing tag")], "template"),
        ([turn("user", "q"), turn("assistant", "<think>\nr\n</think>\n\na", "r")], "template"),
        ([turn("user", "q"), turn("assistant", "a <think>\nr\n</think>\n\nb")], "template"),
        ([turn("user", "q"), turn("assistant", "a", 7)], "reasoning_content is not text"),
        ([turn("user", "q"), turn("assistant", None, tool_calls=[{"name": "f"}])], "tool_calls"),
        ([turn("user", "q"), turn("assistant", "a", tool_calls="f")], "tool_calls"),
        ([turn("user", "q /no_think"), turn("assistant", "a", "r")], "the last flag is /no_think"),
        ([turn("system", "/think"), turn("user", "q"), turn("assistant", "a")], "the last flag is /think"),
        ([turn("user", "q"), turn("assistant", "a\ud800")], "surrogates not allowed"),
    ],
)
def test_rows_that_teach_nothing_good_are_refused_with_a_reason(messages: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        samples({"messages": messages}, None)


def test_tools_that_are_no_list_are_refused() -> None:
    with pytest.raises(ValueError, match="tools: not a list"):
        samples({"messages": [turn("user", "q"), turn("assistant", "a")], "tools": "[]"}, None)


@needs_shared
def test_messy_conversations_are_judged_as_their_manifest_says() -> None:
    folder = SHARED / "corpus/messy"
    lines = (folder / "messy_sft.jsonl").read_text().splitlines()
    for expected in json.loads((folder / "messy_sft_manifest.json").read_text()):
        row = json.loads(lines[expected["line"] - 1])
        if "keep" in expected["expect"] and "skip" not in expected["expect"]:
            assert samples(row, None), expected
        elif expected["expect"].startswith("skip") and expected["kind"] != "prompt_longer_than_context":
            with pytest.raises(ValueError, match=expected["expect"].partition(":")[2] or "messages"):
                samples(row, None)
