"""Random conversations: samples that teach the assistant's words and nothing else, or one clear reason."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from data_pipeline.chat import Piece, encode, samples
from data_pipeline.config import CHAT_TEMPLATES, DataConfig, SourceConfig, read_template
from data_pipeline.documents import Document, Reject, read_documents
from data_pipeline.forms import read
from data_pipeline.inputs import list_inputs
from data_pipeline.readers import plan_slices, read_rows
from data_pipeline.templated import Template
from data_pipeline.tokenizer import Tokenizer, train_tokenizer

OURS, THEIRS = "\ue000", "\ue001"  # signs that stand only in what the assistant, and what others, say
SPOKEN = [
    "",
    " ",
    "a",
    "\n",
    "/think",
    "/no_think",
    "<think>",
    "</think>",
    "<|im_end|>",
    "<tool_call>",
    "ü",
    "🙂",
]
SPOKEN += [
    "<|im_start|>assistant\n",
    "<tool_response>",
    "</tool_response>",
    "\0",
    "\u2028",
    "\ud800",
    "q /think",
]
TEXTS = st.one_of(
    st.sampled_from(SPOKEN), st.lists(st.sampled_from(SPOKEN), max_size=4).map("".join), st.text(max_size=6)
)
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(), TEXTS)
ANYTHING = st.recursive(
    PLAIN,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)
# Words without markup, so that many conversations are sound.
WORDS = st.sampled_from(["a", "b c", "ü", "\n", "🙂", "x\n\n", "1", "<|im_end|>", "<tool_call>"])


def said_by(sign: str) -> st.SearchStrategy[str]:
    return WORDS.map(lambda words: f"{sign}{words}{sign}")


CALLS = st.lists(
    st.fixed_dictionaries(
        {"name": said_by(OURS), "arguments": st.one_of(said_by(OURS), st.dictionaries(said_by(OURS), PLAIN))}
    ).flatmap(lambda call: st.sampled_from([call, {"type": "function", "function": call}])),
    max_size=2,
)
ASSISTANT = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": said_by(OURS)},
    optional={
        "reasoning_content": st.one_of(st.none(), said_by(OURS)),
        "tool_calls": st.one_of(st.none(), CALLS),
    },
)
OTHERS = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "user", "tool"]), "content": said_by(THEIRS)}
)
MESSAGES = st.tuples(OTHERS, st.lists(st.one_of(OTHERS, ASSISTANT), max_size=5), ASSISTANT).map(
    lambda parts: [parts[0], *parts[1], parts[2]]
)
SOUND = st.fixed_dictionaries(
    {"messages": MESSAGES}, optional={"tools": st.lists(st.dictionaries(said_by(THEIRS), TEXTS), max_size=2)}
)


@st.composite
def rows(draw: st.DrawFn) -> Any:
    """A sound row; or one with some value replaced by anything, or removed; or anything."""
    row = draw(SOUND)
    kind = draw(st.integers(0, 4))
    if kind == 0:
        return draw(ANYTHING)
    if kind == 1:
        return row
    group: Any = row
    if kind > 2:
        group = draw(st.sampled_from(row["messages"]))
    key = draw(st.sampled_from([*group, "content", "role", "tool_calls", "tools", "reasoning_content"]))
    if draw(st.booleans()):
        group[key] = draw(ANYTHING)
    else:
        group.pop(key, None)
    return row


def as_json(value: Any) -> st.SearchStrategy[Any]:
    """A value as it is, or as JSON."""
    return st.sampled_from([value, json.dumps(value)])


@st.composite
def disguised(draw: st.DrawFn, row: dict[str, Any]) -> dict[str, Any]:
    """A sound row in another form that says the same."""
    names = {"system": "developer", "user": "human", "assistant": "gpt", "tool": "observation"}
    messages = []
    for message in row["messages"]:
        role, content, keys = message["role"], message["content"], dict(message)
        if draw(st.booleans()):
            cut = draw(st.integers(0, len(content)))
            parts = [{"type": "text", "text": content[:cut]}, {"type": "text", "text": content[cut:]}]
            keys["content"] = parts
        keys["role"] = draw(st.sampled_from([role, names[role]]))
        if draw(st.booleans()):
            keys = {{"role": "from", "content": "value"}.get(key, key): keys[key] for key in keys}
        if keys.get("reasoning_content"):
            keys[draw(st.sampled_from(["thinking", "reasoning"]))] = keys.pop("reasoning_content")
        if keys.get("tool_calls"):
            keys["tool_calls"] = draw(as_json(keys["tool_calls"]))
        messages.append(keys)
    found = {draw(st.sampled_from(["messages", "conversations"])): draw(as_json(messages))}
    if "tools" in row:
        tools = [draw(as_json(tool)) for tool in row["tools"]]
        found["tools"] = draw(as_json(tools))
    return found


COLUMNS = ["messages", "conversations", "instruction", "input", "output", "history", "system", "tools"]
COLUMNS += ["prompt", "completion", "chosen", "label", "enable_thinking"]
KEYS = [
    "role",
    "from",
    "content",
    "value",
    "reasoning",
    "tool_calls",
    "function_call",
    "weight",
    "train",
    "mask",
]
ROLES = ["human", "gpt", "function_call", "observation", "developer", "user", "assistant", "bot"]
MESSAGE = st.dictionaries(
    st.sampled_from(KEYS),
    st.one_of(
        ANYTHING, st.sampled_from([0, 1, True, *ROLES]), st.lists(st.just({"type": "text", "text": "a"}))
    ),
)
TURN = st.builds(lambda more, role: more | {"role": role, "content": "a"}, MESSAGE, st.sampled_from(ROLES))
LISTS = st.lists(st.one_of(OTHERS, ASSISTANT, TURN, MESSAGE), max_size=4)
# Some of the columns that forms have, each of which holds messages, text, JSON or anything.
SOME_COLUMNS = st.dictionaries(
    st.sampled_from(COLUMNS),
    st.one_of(LISTS, LISTS.map(json.dumps), said_by(OURS), st.lists(st.lists(TEXTS, max_size=2)), ANYTHING),
    max_size=3,
)
ASKED, ANSWERED = said_by(THEIRS), said_by(OURS)
OF_FORMS = st.one_of(
    SOUND.flatmap(disguised),
    st.fixed_dictionaries(
        {"instruction": ASKED, "output": ANSWERED}, optional={"input": ASKED, "system": ASKED}
    ),
    st.fixed_dictionaries({"prompt": ASKED, "completion": ANSWERED}),
    st.fixed_dictionaries({"prompt": ASKED, "chosen": st.one_of(ANSWERED, MESSAGES)}),
    st.just({}),
)
ANY_FORM = st.builds(lambda row, more: row | more, OF_FORMS, st.one_of(st.just({}), SOME_COLUMNS))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(["the quick brown fox <|im_end|> /think"] * 3, 512), "trained")


@pytest.fixture
def config(data_config: DataConfig, tmp_path: Path) -> DataConfig:
    source = SourceConfig("sft", [str(tmp_path / "chat.jsonl")])
    return replace(data_config, sources={"chat": source}, max_chat_tokens=400)


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text if piece.text is not None else str(piece.control) for piece in pieces)


def outcome(make: Callable[[Any, None], list[list[Piece]]], row: Any) -> list[list[Piece]] | str:
    """The samples of a row, or the reason why it has none."""
    try:
        return make(row, None)
    except ValueError as error:
        return str(error)


def check_ids(pieces: list[Piece], tokenizer: Tokenizer) -> None:
    """The ids are those of the text, with a mark for each, and the marks are those of the pieces."""
    ids, loss = encode(pieces, tokenizer)
    assert len(ids) == len(loss)
    assert tokenizer.decode(ids.tolist()) == text_of(pieces)
    assert tokenizer.decode(ids[loss].tolist()) == text_of([piece for piece in pieces if piece.loss])


def judged(values: list[Any], config: DataConfig, tokenizer: Tokenizer) -> list[type]:
    """The kinds of what becomes of rows in a file; none is lost, and each bad one is named."""
    source = config.sources["chat"]
    [path] = source.paths
    Path(path).write_text("".join(json.dumps(value) + "\n" for value in values))
    [[part]] = plan_slices(source, list_inputs("chat", source, {}), 1 << 30)
    items = list(read_documents(config, "chat", read_rows(source, part), tokenizer))
    assert {item.row.line for item in items} == set(range(1, len(values) + 1)), "no row is lost"
    for item in items:
        if isinstance(item, Reject):
            assert item.reason
            told = f"{path}: the row at {item.row.offset} is bad ({item.reason}): "
            assert str(item.error()).startswith(told)
        else:
            assert item.pieces is not None
            check_ids(item.pieces, tokenizer)
    return [type(item) for item in items]


@pytest.mark.fuzzing(150, 10_000)
def test_any_row_is_a_conversation_or_is_named(fuzz, config: DataConfig, tokenizer: Tokenizer) -> None:
    verdicts = []

    @fuzz(st.lists(rows(), min_size=1, max_size=3), st.sampled_from([None, 0.0, 0.5, 1.0]))
    def holds(values, think_flag_share):
        verdicts.extend(judged(values, replace(config, think_flag_share=think_flag_share), tokenizer))

    for kind in (Document, Reject):
        assert verdicts.count(kind) > len(verdicts) / 10, "both kinds are tried"


@pytest.mark.fuzzing(150, 10_000)
@pytest.mark.parametrize("kind", ["sft", "prompts"])
def test_any_row_of_any_form_is_a_conversation_or_is_named(
    fuzz, config: DataConfig, tokenizer: Tokenizer, kind: str
) -> None:
    required = [] if kind == "prompts" else None
    source, verdicts = replace(config.sources["chat"], kind=kind, required_fields=required), []

    @fuzz(st.lists(ANY_FORM, min_size=1, max_size=3))
    def holds(values):
        verdicts.extend(judged(values, replace(config, sources={"chat": source}), tokenizer))

    for verdict in (Document, Reject):
        assert verdicts.count(verdict) > len(verdicts) / 10, "both kinds are tried"


@pytest.mark.fuzzing(150, 10_000)
def test_learned_are_all_words_of_the_assistant_and_no_others(fuzz, tokenizer: Tokenizer) -> None:
    accepted = []

    @fuzz(SOUND, st.sampled_from([None, 0.0, 0.5, 1.0]))
    def holds(row, think_flag_share):
        before = json.dumps(row)
        try:
            found = samples(row, think_flag_share)
        except ValueError as error:
            reason = str(error)
        else:
            reason = ""
        if reason:
            assert reason.startswith(("messages", "json: ", "'utf-8' codec")), reason
            return
        accepted.append(row)
        assert json.dumps(row) == before, "the row stays as it is"
        answers = [message for message in row["messages"] if message["role"] == "assistant"]
        learned = [piece for pieces in found for piece in pieces if piece.loss]
        assert sum(piece.control == "<|im_end|>" for piece in learned) == len(answers), "each in one sample"
        text = text_of(learned)
        assert THEIRS not in text
        assert all(message["content"].strip() in text for message in answers)
        for pieces in found:
            check_ids(pieces, tokenizer)
            assert all((piece.text is None) != (piece.control is None) for piece in pieces)
        others = text_of([piece for piece in found[0] if not piece.loss])
        assert OURS not in others, "the first sample learns all that the assistant says in it"

    assert len(accepted) > 50


@pytest.mark.fuzzing(150, 10_000)
def test_a_conversation_in_another_form_is_the_same(fuzz) -> None:
    @fuzz(SOUND.flatmap(lambda row: st.tuples(st.just(row), disguised(row))))
    def holds(pair):
        source = SourceConfig("sft", ["x"])
        plain, other = (read(row, source) for row in pair)
        assert json.dumps(other.row, sort_keys=True) == json.dumps(plain.row, sort_keys=True)
        assert not other.ignored


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_only_the_assistant_may_call_a_tool_without_words(role: str) -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": role, "content": None, "tool_calls": [{"name": "f", "arguments": {}}]},
        {"role": "assistant", "content": "a"},
    ]
    with pytest.raises(ValueError, match=r"messages\[1\]: content is of type NoneType, not text"):
        samples({"messages": messages}, None)


@pytest.mark.fuzzing(100, 3_000)
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_templates_in_jinja_learn_all_words_of_the_assistant(fuzz, tokenizer: Tokenizer, name: str) -> None:
    """Or they refuse the row. In Jinja, Qwen3's template has the samples of its code."""
    accepted, template = [], Template(read_template(name), f"{name}.jinja")

    @fuzz(SOUND)
    def holds(row):
        before = json.dumps(row)
        by_code, found = outcome(samples, row), outcome(template.samples, row)
        if isinstance(by_code, str):
            assert isinstance(found, str)
            return
        if isinstance(found, str):
            roles = [message["role"] for message in row["messages"]]
            assert "template: " in found
            assert name != "qwen3" or ("assistant", "assistant") in itertools.pairwise(roles)
            return
        accepted.append(row)
        assert json.dumps(row) == before, "the row stays as it is"
        assert name != "qwen3" or found == by_code
        learned = [piece for pieces in found for piece in pieces if piece.loss]
        answers = [message for message in row["messages"] if message["role"] == "assistant"]
        assert sum(piece.control == "<|im_end|>" for piece in learned) == len(answers), "each in one sample"
        text = text_of(learned)
        assert THEIRS not in text
        for message in answers:
            assert message["content"].strip() in text
            assert (message.get("reasoning_content") or "").strip() in text
        for pieces in found:
            check_ids(pieces, tokenizer)

    assert len(accepted) > 15
