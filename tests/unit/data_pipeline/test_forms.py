"""Conversations in the forms that people have: from a file to tokens and what is learned of them."""

import contextlib
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import readers
from data_pipeline.config import CHAT_KINDS, DataConfig, DataError, SourceConfig
from data_pipeline.forms import read
from data_pipeline.manifest import Manifest, SourceRecord
from data_pipeline.prepare import prepare
from data_pipeline.prompts import Prompts
from data_pipeline.shards import TokenStream
from data_pipeline.streaming import TextStream
from data_pipeline.tokenizer import load_tokenizer

SEED, VOCAB_SIZE = 7, 512
Row = dict[str, Any]


class Prepared(NamedTuple):
    """shown: a text for each document, in which [brackets] hold what is not learned."""

    shown: list[str]
    reasons: list[str]
    record: SourceRecord
    config: DataConfig


Prepare = Callable[..., Prepared]


def said(role: str, content: Any, **more: Any) -> Row:
    return {"role": role, "content": content, **more}


def spoken(of: str, value: Any, **more: Any) -> Row:
    return {"from": of, "value": value, **more}


def write(path: Path, rows: list[Row]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)


def shown(config: DataConfig, record: SourceRecord) -> list[str]:
    stream, tokenizer = TokenStream(Path(config.dir), record.shards["train"]), load_tokenizer(config.dir)
    found = []
    borders = [border for offsets in stream.document_offsets() for border in offsets[:-1]]
    for start, stop in itertools.pairwise([*borders, len(stream)]):
        ids, loss = stream.read(start, stop - 1), stream.read_loss(start, stop - 1)
        edges = [0, *(np.flatnonzero(np.diff(loss)) + 1).tolist(), len(ids)]
        spans = [(tokenizer.decode(ids[a:b].tolist()), loss[a]) for a, b in itertools.pairwise(edges)]
        found.append("".join(text if learned else f"[{text}]" for text, learned in spans))
    return found


@pytest.fixture
def prepared_of(data_config: DataConfig, tmp_path: Path) -> Prepare:
    """Prepares rows as a source of kind sft; `keys` are those of the source."""

    def of(rows: list[Row], suffix: str = ".jsonl", **keys: Any) -> Prepared:
        path = tmp_path / f"chat{suffix}"
        write(path, rows)
        source = SourceConfig(**{"kind": "sft", "paths": [str(path)], **keys})
        folder = tmp_path / f"prepared-{time.monotonic_ns()}"
        shape = {
            "validation_fraction": 0.0,
            "deduplicate": "none",
            "slice_bytes": 10**6,
            "shard_bytes": 10**6,
        }
        config = replace(data_config, sources={"chat": source}, dir=str(folder), **shape)
        record = prepare(config, VOCAB_SIZE, SEED).sources["chat"]
        rejects = map(json.loads, (folder / "rejects.jsonl").read_text().splitlines())
        is_text = source.kind == "sft"
        return Prepared(
            shown(config, record) if is_text else [], [of["reason"] for of in rejects], record, config
        )

    return of


def asked(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def answered(text: str, thoughts: str = "") -> str:
    return f"]<think>\n{thoughts}\n</think>\n\n{text}<|im_end|>[\n]"


CALL = {"name": "add", "arguments": {"a": 1}}
TOOL = {"type": "function", "function": {"name": "add"}}
TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with"
    " function"
    " signatures within <tools></tools> XML tags:\n<tools>\n"
    + json.dumps(TOOL)
    + "\n</tools>\n\nFor each function"
    " call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
SYSTEM = "[<|im_start|>system\nS<|im_end|>\n"
PLAIN = "[" + asked("q") + answered("a")
SECOND = "[" + asked("q") + "]a<|im_end|>[\n" + asked("r") + answered("b")
UNLEARNED = "[" + asked("q") + "a<|im_end|>\n" + asked("r") + answered("b")
USED = (
    "[<|im_start|>system\n" + TOOLS + asked("q") + "]" + CALLED + "[\n<|im_start|>user\n<tool_response>\n3\n"
    "</tool_response><|im_end|>\n<|im_start|>assistant\n" + answered("a")
)
Q, A, R, B = said("user", "q"), said("assistant", "a"), said("user", "r"), said("assistant", "b")
CALLING = said("assistant", None, tool_calls=[{"type": "function", "function": CALL}])
TOOL_ROWS = [Q, CALLING, said("tool", "3"), A]
PARTS = [{"type": "text", "text": "q"}]
# name -> (a row, the keys of its source, what is prepared of it)
FORMS: dict[str, tuple[Row, Row, str]] = {
    "plain": ({"messages": [Q, A]}, {}, PLAIN),
    "parts": (
        {"messages": [said("user", [{"type": "text", "text": "q"}, {"type": "text", "text": " /x"}]), A]},
        {},
        "[" + asked("q /x") + answered("a"),
    ),
    "parts of all roles": (
        {
            "messages": [
                said("system", [{"type": "text", "text": "S"}]),
                said("user", PARTS),
                said("assistant", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
                said("tool", [{"type": "text", "text": "3"}]),
                said("assistant", [{"type": "text", "text": "c"}]),
            ]
        },
        {},
        SYSTEM
        + asked("q")
        + "]ab<|im_end|>[\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n" + answered("c"),
    ),
    "tools": ({"messages": TOOL_ROWS, "tools": [TOOL]}, {}, USED),
    "tools as JSON text": (
        {"messages": json.dumps(TOOL_ROWS), "tools": json.dumps([TOOL])},
        {},
        USED,
    ),
    "each tool as JSON": ({"messages": json.dumps(TOOL_ROWS), "tools": [json.dumps(TOOL)]}, {}, USED),
    "tool_calls as JSON": (
        {"messages": [Q, said("assistant", "", tool_calls=json.dumps([CALL])), said("tool", "3"), A]}
        | {"tools": json.dumps([TOOL])},
        {},
        USED,
    ),
    "the earlier function_call of OpenAI": (
        {
            "messages": [
                Q,
                said("assistant", None, function_call={"name": "add", "arguments": '{"a": 1}'}),
                said("function", "3", name="add"),
                A,
            ]
        }
        | {"tools": json.dumps([TOOL])},
        {},
        USED,
    ),
    "no tools": ({"messages": [Q, A], "tools": ""}, {}, PLAIN),
    "sharegpt": ({"conversations": [spoken("human", "q"), spoken("gpt", "a")]}, {}, PLAIN),
    "sharegpt with a system column": (
        {"conversations": [spoken("human", "q"), spoken("gpt", "a")], "system": "S"},
        {"format": "sharegpt"},
        SYSTEM + asked("q") + answered("a"),
    ),
    "sharegpt with its own system": (
        {"conversations": [spoken("system", "S"), spoken("human", "q"), spoken("gpt", "a")], "system": "T"},
        {},
        SYSTEM + asked("q") + answered("a"),
    ),
    "sharegpt with tools": (
        {
            "conversations": [
                spoken("human", "q"),
                spoken("function_call", json.dumps(CALL)),
                spoken("observation", "3"),
                spoken("gpt", "a"),
            ],
            "tools": json.dumps([TOOL]),
        },
        {},
        USED,
    ),
    "calls one after another": (
        {"messages": [Q, said("tool_call", json.dumps(CALL)), said("tool_call", json.dumps(CALL)), R, B]},
        {},
        "["
        + asked("q")
        + "]"
        + CALLED.replace("<|im_end|>", "\n")
        + CALLED
        + "[\n"
        + asked("r")
        + answered("b"),
    ),
    "words before a call": (
        {"messages": [Q, A, said("function_call", json.dumps([CALL])), R, B]},
        {},
        "[" + asked("q") + "]a\n" + CALLED + "[\n" + asked("r") + answered("b"),
    ),
    "roles and keys of messages": (
        {"conversations": [{"role": "human", "value": "q"}, {"from": "assistant", "content": "a"}]},
        {},
        PLAIN,
    ),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, {}, PLAIN),
    "alpaca with input": (
        {"instruction": "q", "input": "x", "output": "a"},
        {},
        PLAIN.replace("q<", "q\nx<"),
    ),
    "alpaca with history": (
        {"instruction": "r", "output": "b", "system": "S", "history": [["q", "a"]]},
        {"format": "alpaca"},
        SYSTEM + SECOND[1:],
    ),
    "history as JSON": ({"instruction": "r", "output": "b", "history": '[["q", "a"]]'}, {}, SECOND),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, {}, PLAIN),
    "messages of prompt and completion": ({"prompt": [Q, A, R], "completion": [B]}, {}, UNLEARNED),
    "a good completion": ({"prompt": "q", "completion": "a", "label": True}, {}, PLAIN),
    "a good completion by number": ({"prompt": "q", "completion": "a", "label": 1}, {}, PLAIN),
    "chosen": ({"prompt": "q", "chosen": "a", "rejected": "bad"}, {}, PLAIN),
    "chosen with a label of something else": ({"prompt": "q", "chosen": "a", "label": False}, {}, PLAIN),
    "an input without an instruction": ({"instruction": "", "input": "q", "output": "a"}, {}, PLAIN),
    "chosen text with the prompt": ({"prompt": "q\n", "chosen": "q\na"}, {}, PLAIN.replace("q<", "q\n<")),
    "chosen messages": ({"prompt": [Q], "chosen": [A], "rejected": [B]}, {}, PLAIN),
    "chosen messages with the prompt": ({"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]}, {}, PLAIN),
    "chosen messages with the end of the prompt": (
        {"prompt": [said("system", "S"), Q], "chosen": [Q, A]},
        {},
        SYSTEM + asked("q") + answered("a"),
    ),
    "chosen conversation": ({"prompt": "q", "chosen": [Q, A, R, B]}, {}, UNLEARNED),
    "chosen alone": (
        {"chosen": [Q, A, R, B], "rejected": [Q, A, R, A]},
        {"format": "prompt_completion"},
        UNLEARNED,
    ),
    "named columns": (
        {"question": "q", "reply": "a"},
        {"format": "prompt_completion", "columns": {"prompt": "question", "completion": "reply"}},
        PLAIN,
    ),
    "a named list": ({"dialog": [Q, A], "messages": "x"}, {"columns": {"messages": "dialog"}}, PLAIN),
    "named roles": ({"messages": [Q, said("bot", "a")]}, {"roles": {"bot": "assistant"}}, PLAIN),
    "named keys": (
        {"messages": [{"who": "user", "text": "q"}, {"who": "assistant", "text": "a"}]},
        {"message_keys": {"role": "who", "content": "text"}},
        PLAIN,
    ),
    "developer": ({"messages": [said("developer", "S"), Q, A]}, {}, SYSTEM + asked("q") + answered("a")),
    "thinking": (
        {"messages": [Q, said("assistant", "a", thinking="t")]},
        {},
        "[" + asked("q") + answered("a", "t"),
    ),
    "reasoning": (
        {"messages": [Q, said("assistant", "a", reasoning="t")]},
        {},
        "[" + asked("q") + answered("a", "t"),
    ),
    "reasoning twice": (
        {"messages": [Q, said("assistant", "a", reasoning="t", reasoning_content="t")]},
        {},
        "[" + asked("q") + answered("a", "t"),
    ),
    "only the closing tag": (
        {"messages": [Q, said("assistant", "t\n</think>\n\na")]},
        {},
        "[" + asked("q") + answered("a", "t"),
    ),
    "weight": (
        {"messages": [Q, said("assistant", "a", weight=0), R, said("assistant", "b", weight=1)]},
        {},
        UNLEARNED,
    ),
    "train": (
        {"conversations": [spoken("human", "q"), spoken("gpt", "a", train=False), R, B]},
        {},
        UNLEARNED,
    ),
    "loss": (
        {"messages": [Q, said("assistant", "a", loss=False), R, said("assistant", "b", loss=True)]},
        {},
        UNLEARNED,
    ),
    "masked": ({"messages": [Q, said("assistant", "a", masked=True), R, B]}, {}, UNLEARNED),
    "mask that means learned": (
        {
            "messages": [
                said("user", "q", mask=0),
                said("assistant", "a", mask=0),
                R,
                said("assistant", "b", mask=1),
            ]
        },
        {"message_keys": {"weight": "mask"}},
        UNLEARNED,
    ),
    "mask that means not learned": (
        {"messages": [Q, said("assistant", "a", mask=True), R, said("assistant", "b", mask=False)]},
        {"message_keys": {"masked": "mask"}},
        UNLEARNED,
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(prepared_of: Prepare, name: str) -> None:
    row, keys, expected = FORMS[name]
    found = prepared_of([row], **keys)
    assert (found.shown, found.reasons, found.record.ignored) == ([expected], [], {})


IN_TABLES = ["parts of all roles", "tools as JSON text", "sharegpt with tools", "alpaca with history"]


@pytest.mark.parametrize("name", [*IN_TABLES, "chosen messages with the prompt", "thinking", "train"])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_forms_in_tables(prepared_of: Prepare, name: str, suffix: str) -> None:
    row, keys, expected = FORMS[name]
    found = prepared_of([row], suffix, **keys)
    assert (found.shown, found.reasons, found.record.ignored) == ([expected], [], {})


def test_rows_of_several_forms_in_one_file(prepared_of: Prepare) -> None:
    names = [name for name, (_, keys, _) in FORMS.items() if not keys]
    found = prepared_of([FORMS[name][0] for name in names])
    assert (found.shown, found.reasons) == ([FORMS[name][2] for name in names], [])


def test_a_hub_dataset(
    prepared_of: Prepare, data_config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the hub, only the download is replaced."""
    import datasets

    tokenizer = load_tokenizer(prepared_of([FORMS["plain"][0]]).config.dir)
    row, _, _ = FORMS["sharegpt with tools"]
    monkeypatch.setattr(readers, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([row] * 3))
    source = SourceConfig("sft", ["someone/calls:train"])
    config = replace(data_config, mode="streaming", sources={"chat": source}, validation_fraction=0.0)
    stream = TextStream(config, "chat", tokenizer, SEED)
    ids, loss = stream.read(0, 2000), stream.read_loss(0, 2000)
    text = USED.replace("[", "").replace("]", "") + "<|endoftext|>"
    assert tokenizer.decode(ids.tolist()).startswith(text)
    assert tokenizer.decode(ids[loss].tolist()).startswith(
        CALLED + "<think>\n\n</think>\n\na<|im_end|>" + CALLED
    )


BAD: dict[str, tuple[Row, Row, str]] = {
    "an image": (
        {"messages": [said("user", [*PARTS, {"type": "image_url", "image_url": {"url": "u"}}]), A]},
        {},
        "messages[0]: its content has a part of type image_url; only objects of type text are read",
    ),
    "a part of bare text": (
        {"messages": [said("user", ["q"]), A]},
        {},
        "messages[0]: its content has a part of type str",
    ),
    "a part without text": (
        {"messages": [said("user", [{"type": "text"}]), A]},
        {},
        "messages[0]: its content has a part of type text;",
    ),
    "no JSON": ({"messages": "hello"}, {}, "messages: a text that is not JSON (Expecting value"),
    "JSON that never ends": (
        {"messages": "[" * 100_000},
        {},
        "messages: a text that is not JSON (maximum recursion depth",
    ),
    "JSON of another kind": ({"messages": '{"role": "user"}'}, {}, "messages: not a list"),
    "tools that are no JSON": ({"messages": [Q, A], "tools": "none"}, {}, "tools: a text that is not JSON"),
    "tools of another kind": (
        {"messages": [Q, A], "tools": '["add", 1]'},
        {},
        "tools: a text that is not JSON",
    ),
    "tools of numbers": ({"messages": [Q, A], "tools": "[1]"}, {}, "tools: not a list of objects"),
    "a call that is no JSON": (
        {"conversations": [spoken("human", "q"), spoken("function_call", "add(1)")]},
        {},
        "messages[1]: its tool_calls: a text that is not JSON",
    ),
    "half a weight": (
        {"messages": [Q, said("assistant", "a", weight=0.5)]},
        {},
        "messages[1]: weight is 0.5; only 0 and 1, or false and true, are possible",
    ),
    "a weight of words": (
        {"messages": [Q, said("assistant", "a", train="no")]},
        {},
        "messages[1]: train is of type str;",
    ),
    "mask": (
        {"messages": [Q, said("assistant", "a", mask=1)]},
        {},
        "messages[1]: mask means learned in some sets",
    ),
    "train_detail": (
        {"messages": [Q, said("assistant", "a", train_detail=[{"begin_offset": 0}])]},
        {},
        "messages[1]: train_detail chooses parts of a message",
    ),
    "nothing to learn": (
        {"messages": [Q, said("assistant", "a", weight=0)]},
        {},
        "no_target: no message of the assistant is to be learned",
    ),
    "two reasonings": (
        {"messages": [Q, said("assistant", "a", thinking="t", reasoning="u")]},
        {},
        "messages[1]: thinking and reasoning differ, and both are its reasoning_content",
    ),
    "an unknown role": (
        {"messages": [Q, said("bot", "a")]},
        {},
        "messages[1]: role 'bot' is not one of system, user,",
    ),
    "another question": (
        {"prompt": "q", "chosen": [R, B]},
        {},
        "messages: the answer begins with another question than the prompt",
    ),
    "a bad completion": ({"prompt": "q", "completion": "a", "label": False}, {}, "no_target: its label says"),
    "a bad completion by number": (
        {"prompt": "q", "completion": "a", "label": 0},
        {},
        "no_target: its label",
    ),
    "an unknown label": (
        {"prompt": "q", "completion": "a", "label": "no"},
        {},
        "messages: label is 'no'; only",
    ),
    "a blank prompt": ({"prompt": " ", "completion": "a"}, {}, "empty"),
    "a history of texts": (
        {"instruction": "q", "output": "a", "history": ["q"]},
        {},
        "messages: history: not a list of pairs",
    ),
    "an instruction of a number": (
        {"instruction": 1, "output": "a"},
        {},
        "messages: instruction is of type int, not text",
    ),
    "no column": (
        {"messages": [Q, A]},
        {"format": "alpaca", "columns": {"output": "answer"}},
        "missing: the row has no 'instruction' with 'answer', only 'messages'",
    ),
    "nulls": ({"instruction": None, "output": "a"}, {"format": "alpaca"}, "null"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows(prepared_of: Prepare, name: str) -> None:
    row, keys, reason = BAD[name]
    columns = keys.get("columns", {})
    good = {columns.get(key, key): value for key, value in {"instruction": "q", "output": "a"}.items()}
    found = prepared_of([good, row], **keys)
    assert found.shown == [PLAIN]
    [told] = found.reasons
    assert told.startswith(reason)
    assert found.record.skipped == {reason.partition(":")[0].partition("[")[0]: 1}


def test_answers_that_are_not_learned_make_no_sample(prepared_of: Prepare) -> None:
    """An unlearned answer with reasoning, and an unlearned last one, are only read."""
    thought, unlearned = said("assistant", "a", thinking="t", weight=0), said("assistant", "c", weight=0)
    found = prepared_of([{"messages": [Q, thought, R, B, Q, unlearned]}])
    assert found.shown == [
        "["
        + asked("q")
        + "a<|im_end|>\n"
        + asked("r")
        + "]b<|im_end|>[\n"
        + asked("q")
        + "<think>\n\n</think>\n\nc<|im_end|>\n]"
    ]


def test_keys_that_are_not_used_are_told(prepared_of: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    harmless = {"id": "1", "name": "n", "timestamp": 3, "refusal": None, "annotations": []}
    rows = [
        {"messages": [said("user", "q", **harmless), said("assistant", "a", prefix=True)]},
        {
            "messages": [
                said("user", "r", thinking="t", weight=1),
                said("assistant", "b", prefix=False, audio={"id": 1}),
            ]
        },
        {"messages": [said("user", "s", weight=0), said("assistant", "c", weight=1)]},
        {"messages": [said("user", "s", lost=1), said("assistant", " ")]},
    ]
    found = prepared_of(rows)
    told = {"prefix": 2, "audio": 1, "thinking of user": 1, "weight of user": 1}
    assert found.record.ignored == told
    assert Manifest.load(Path(found.config.dir)).sources["chat"].ignored == told
    line = "  chat: keys of messages that are not used, and in how many documents: 'prefix' in 2, "
    assert line in capsys.readouterr().out
    rows.append({"messages": [said("user", "q", **{f"\ud800{n}": n for n in range(200)}), A]})
    assert len(prepared_of(rows).record.ignored) == 100, "the manifest stays small"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_source_that_fits_no_form_is_refused_at_once(prepared_of: Prepare, suffix: str) -> None:
    law = r"no form of conversations fits; looked for .*alpaca: 'instruction' with 'output'; .*"
    columns = "its columns are question: (str|string), reply: (str|string); name its form by `format`"
    with pytest.raises(DataError, match=law + columns):
        prepared_of([{"question": "q", "reply": "a"}], suffix)
    with pytest.raises(DataError, match=r"looked for columns of text or lists \(sharegpt: 'talk'\)"):
        prepared_of([{"messages": [Q, A]}], suffix, format="sharegpt", columns={"messages": "talk"})


def test_a_refused_source_can_be_named_better_in_the_same_folder(
    data_config: DataConfig, tmp_path: Path
) -> None:
    write(tmp_path / "chat.jsonl", [{"question": "q", "reply": "a"}])
    source = SourceConfig("sft", [str(tmp_path / "chat.jsonl")])
    config = replace(data_config, sources={"chat": source}, validation_fraction=0.0)
    with pytest.raises(DataError, match="no form of conversations fits"):
        prepare(config, VOCAB_SIZE, SEED)
    columns = {"prompt": "question", "completion": "reply"}
    named = replace(config, sources={"chat": replace(source, columns=columns)})
    assert shown(named, prepare(named, VOCAB_SIZE, SEED).sources["chat"]) == [PLAIN]


PROMPTS: dict[str, tuple[Row, Row]] = {
    "parts": ({"messages": [said("user", PARTS)]}, {}),
    "JSON": ({"messages": json.dumps([Q])}, {}),
    "sharegpt": ({"conversations": [spoken("human", "q")]}, {}),
    "alpaca": ({"instruction": "q", "output": "a"}, {"format": "alpaca"}),
    "a list in prompt": ({"prompt": [Q], "messages": None}, {}),
    "a named text": ({"problem": "q"}, {"text_key": "problem"}),
    "a named list": ({"problem": [Q], "prompt": "x"}, {"text_key": "problem"}),
    "a named column": ({"problem": "q"}, {"columns": {"prompt": "problem"}}),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_forms_of_prompts(prepared_of: Prepare, name: str) -> None:
    row, keys = PROMPTS[name]
    row |= {"answer": "1", "system": "S"}
    found = prepared_of([row], kind="prompts", **keys)
    with Prompts(found.config, seed=SEED, source="chat") as prompts:
        text = load_tokenizer(found.config.dir).decode(prompts[0].ids)
        assert text == SYSTEM[1:] + asked("q")
        assert prompts[0].fields == row, "the row is kept as it is"


def test_a_wrong_text_key_is_told_by_its_name(prepared_of: Prepare) -> None:
    with pytest.raises(DataError, match="its columns are problem: str, answer: str; set text_key of the"):
        prepared_of([{"problem": "q", "answer": "1"}], kind="prompts", text_key="prblem")


def test_a_named_prompt_admits_no_other_form(prepared_of: Prepare) -> None:
    rows = [{"problem": "q", "answer": "1"}, {"messages": [Q], "answer": "1"}]
    found = prepared_of(rows, kind="prompts", text_key="problem")
    assert found.reasons == ["missing: the row has no 'problem', only 'messages', 'answer'"]


def test_settings_name_what_decides_the_tokens(prepared_of: Prepare) -> None:
    config = prepared_of([FORMS["plain"][0]]).config
    folder = Path(config.dir)
    manifest = Manifest.load(folder)
    source, key = config.sources["chat"], "data.sources.chat"
    usual = replace(source, columns={}, roles={}, message_keys={})
    for same in (source, usual):
        manifest.check_settings(replace(config, sources={"chat": same}).content_settings(), folder)
    changes = {"format": "messages", "columns": {"messages": "m"}, "roles": {"x": "user"}}
    for name, value in (changes | {"message_keys": {"content": "c"}}).items():
        other = replace(config, sources={"chat": replace(source, **{name: value})})
        with pytest.raises(DataError, match=rf"{key}\.{name}: prepared with None, now "):
            manifest.check_settings(other.content_settings(), folder)
        with pytest.raises(DataError, match=rf"{key}\.{name}: prepared with .*, now None"):
            replace(manifest, settings=other.content_settings()).check_settings(
                config.content_settings(), folder
            )
    for name in ("format", *changes, "message_keys"):  # a folder of an earlier version has none of the keys
        manifest.settings.pop(f"{key}.{name}", None)
    manifest.check_settings(config.content_settings(), folder)


def test_laws(data_config: DataConfig) -> None:
    def problems(kind: str, **keys: Any) -> list[str]:
        source = SourceConfig(kind, ["x"], **keys)
        return replace(data_config, sources={"s": source}).problems()

    key = "data.sources.s"
    assert problems("sft", format="alpaca", columns={"output": "x", "system": "y"}) == []
    assert problems("prompts", roles={"x": "user"}, message_keys={"weight": "w"}) == []
    assert problems("sft", format="openai") == [
        f"{key}.format=openai is unknown; use auto, messages, sharegpt, alpaca, prompt_completion"
    ]
    assert problems("sft", format="messages", columns={"dialog": "x", "messages": "y"}) == [
        f"{key}.columns.dialog is unknown; use messages, system, tools"
    ]
    assert problems("sft", message_keys={"reasoning": "r"}) == [
        f"{key}.message_keys.reasoning is unknown;"
        " use role, content, reasoning_content, tool_calls, weight, masked"
    ]
    assert problems("sft", roles={"x": "bot"}) == [
        f"{key}.roles.x=bot is not a role; use system, user, assistant, tool, function_call"
    ]
    assert problems("prompts", text_key="p", format="alpaca") == [
        f"{key}.text_key=p names a prompt, but format=alpaca says what a row has;"
        " set one of them to its default"
    ]
    named = {"format": "messages", "columns": {"messages": "x"}, "roles": {"x": "user"}}
    assert problems("jsonl", **named) == [
        f"{key}.{name} has no use with kind=jsonl; remove it" for name in named
    ]


def test_a_row_is_not_changed() -> None:
    for row, keys, _ in [*FORMS.values(), *BAD.values()]:
        for kind in CHAT_KINDS:
            before = json.dumps(row)
            with contextlib.suppress(ValueError):
                read(row, SourceConfig(kind, [], **keys))
            assert json.dumps(row) == before


@pytest.mark.parametrize("arguments", ['{"a"', "[1]", '"a"', "", 3])
def test_a_call_whose_arguments_are_no_object_is_refused(prepared_of: Prepare, arguments: object) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    said = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    fine = {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "gone"}]}
    found = prepared_of([{"messages": said}, fine])
    [reason] = found.reasons
    assert "tool_calls is not a list of objects with a name and arguments" in reason
