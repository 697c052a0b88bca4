"""A row of any form in which conversations are published, as the one row that chat.py renders.

That row has `messages` and `tools`. A message has `role` (system, user, assistant or tool) and `content`
(text); one of the assistant may also have `reasoning_content`, `tool_calls`, and `learned`, which is False.
docs/data.md describes the forms. They are those of OpenAI (messages, parts, weight), LLaMA-Factory
(sharegpt, alpaca), TRL (prompt_completion, chosen), Axolotl (train), ms-swift (loss, tool_call) and
torchtune (masked).
"""

import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from data_pipeline.config import FORM_COLUMNS, SourceConfig

# Of each kind of source: its forms, in the order in which `format: auto` tries them, each with the groups of
# columns of which a row must have one.
_NEEDS = {
    "sft": {
        "messages": ["messages"],
        "sharegpt": ["messages"],
        "alpaca": ["instruction output"],
        "prompt_completion": ["prompt completion", "chosen"],
    },
    "prompts": {
        "prompt_completion": ["prompt"],
        "messages": ["messages"],
        "sharegpt": ["messages"],
        "alpaca": ["instruction"],
    },
}
# The keys under which a message says each of MESSAGE_KEYS, beside those that a source names.
_KEYS = {
    "role": ("role", "from"),
    "content": ("content", "value"),
    "reasoning_content": ("reasoning_content", "reasoning", "thinking"),
    "tool_calls": ("tool_calls", "function_call"),
    "weight": ("weight", "train", "training", "loss"),
    "masked": ("masked",),
}
_ROLES = {
    "developer": "system",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function": "tool",
    "tool_call": "function_call",
}
# Keys that change nothing in what a message teaches.
_HARMLESS = {
    *("id", "uuid", "message_id", "parent_id", "tool_call_id", "name", "index", "model"),
    *("source", "language", "timestamp", "created_at", "updated_at", "create_time", "date"),
    *("token_count", "num_tokens"),
}
_REFUSED = {
    "mask": "means learned in some sets and not learned in others; say which by message_keys of the source:"
    " {weight: mask} or {masked: mask}",
    "train_detail": "chooses parts of a message, but only whole messages can be left out, by weight 0",
}


class Conversation(NamedTuple):
    """row: `messages` and `tools`, as chat.py renders them. ignored: keys of the messages that are neither
    used nor known to be harmless; `KEY of ROLE` where only the assistant's KEY is used."""

    row: dict[str, Any]
    ignored: frozenset[str]


class _Names(NamedTuple):
    keys: dict[str, str]  # key of a message -> which of MESSAGE_KEYS it says
    roles: dict[str, str]


class _Turn(NamedTuple):
    message: dict[str, Any]
    ignored: frozenset[str] = frozenset()
    is_call: bool = False  # a call of tools that stands in a message of its own


def read(row: Mapping[str, Any], source: SourceConfig) -> Conversation:
    """The conversation of a row of a source of kind sft; of kind prompts, without the answer.

    Raises ValueError, `code` or `code: details`, for a row that has none of the forms of the source, and for
    parts that cannot be understood. Whether the conversation is complete is chat.py's to judge.
    """
    form = form_of(source, {name for name, value in row.items() if value is not None})
    if form is None and form_of(source, row.keys()):
        raise ValueError("null")
    if form is None:
        shown = (_shown(group) for groups in _wanted(source).values() for group in groups)
        has = ", ".join(map(repr, row)) or "nothing"
        raise ValueError(f"missing: the row has no {' or '.join(dict.fromkeys(shown))}, only {has}")
    columns = {name: row.get(_column(source, form, name)) for name in FORM_COLUMNS[form]}
    keys = {key: meaning for meaning, of in _KEYS.items() for key in of}
    keys |= {key: meaning for meaning, key in (source.message_keys or {}).items()}
    names = _Names(keys, _ROLES | (source.roles or {}))
    asks = source.kind == "prompts"
    if form == "alpaca":
        turns = _alpaca(columns, asks)
    elif form == "prompt_completion":
        turns = _prompt(columns, names) if asks else _completed(columns, names)
    else:
        turns = _turns(columns["messages"], names)
    system = _text("system", columns["system"])
    if system.strip() and not (turns and turns[0].message["role"] == "system"):
        turns = [_said("system", system), *turns]
    ignored = frozenset[str]().union(*(turn.ignored for turn in turns))
    tools = _objects("tools", columns["tools"])
    return Conversation({"messages": [turn.message for turn in turns], "tools": tools}, ignored)


def form_of(source: SourceConfig, columns: Collection[str]) -> str | None:
    """The first form of a source whose columns are all among `columns`; None if there is none."""
    for form, groups in _wanted(source).items():
        if any(all(name in columns for name in group) for group in groups):
            return form
    return None


def misfit(source: SourceConfig, columns: Mapping[str, str]) -> str:
    """What is wrong with a source that has none of its forms, and the remedy. columns: name -> type."""
    looked = (f"{form}: {' or '.join(map(_shown, groups))}" for form, groups in _wanted(source).items())
    listed = ", ".join(f"{name}: {kind}" for name, kind in columns.items()) or "none"
    remedy = "name its form by `format` of the source and its columns by `columns`, such as"
    example = "{format: prompt_completion, columns: {prompt: question, completion: reply}}"
    if source.text_key is not None:  # which admits no `format`
        remedy, example = "set text_key of the source to the column of the prompt,", "or to null"
    law = f"no form of conversations fits; looked for columns of text or lists ({'; '.join(looked)})"
    return f"{law}; its columns are {listed}; {remedy} {example}"


def _wanted(source: SourceConfig) -> dict[str, list[list[str]]]:
    """The forms that a source may have, each with the groups of columns that make it one."""
    needs = _NEEDS[source.kind]
    given = "prompt_completion" if source.text_key is not None else source.format
    forms = list(needs) if given == "auto" else [given]
    return {
        of: [[_column(source, of, name) for name in group.split()] for group in needs[of]] for of in forms
    }


def _shown(group: list[str]) -> str:
    return " with ".join(map(repr, group))


def _column(source: SourceConfig, form: str, name: str) -> str:
    """The column of a source that holds what a form calls `name`."""
    usual = "conversations" if (form, name) == ("sharegpt", "messages") else name
    usual = source.text_key or usual if name == "prompt" else usual
    return (source.columns or {}).get(name, usual)


def _alpaca(columns: Mapping[str, Any], asks: bool) -> list[_Turn]:
    """instruction and input are a question, output is its answer; history holds earlier pairs of both."""
    turns = list[_Turn]()
    for pair in _list("messages: history", columns["history"]):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("messages: history: not a list of pairs of a question and an answer")
        turns += [_said("user", pair[0]), _said("assistant", pair[1])]
    question, more = _text("instruction", columns["instruction"]), _text("input", columns["input"])
    asked = [text for text in (question, more) if text.strip()]
    turns.append(_said("user", "\n".join(asked)))
    return turns if asks else [*turns, _said("assistant", columns["output"])]


def _prompt(columns: Mapping[str, Any], names: _Names) -> list[_Turn]:
    prompt = columns["prompt"]
    if isinstance(prompt, str) and not prompt.strip():
        raise ValueError("empty")
    return [_said("user", prompt)] if isinstance(prompt, str) else _turns(prompt, names)


def _completed(columns: Mapping[str, Any], names: _Names) -> list[_Turn]:
    """A prompt with its completion, or with the chosen one of several. Each is a text or a list of messages.

    Where an answer repeats the end of the prompt, this counts once. Nothing up to the last question is
    learned: it is what was completed, or what the chosen and the rejected answer have in common.
    """
    prompt, answer = columns["prompt"], columns["completion"]
    if answer is not None and (label := columns["label"]) is not None:
        if not _is_flag(label):
            raise ValueError(f"messages: label is {label!r}; only 0 and 1, or false and true, are possible")
        if not label:
            raise ValueError("no_target: its label says that the completion is a bad one")
    if answer is None:
        answer = columns["chosen"]
        if isinstance(prompt, str) and isinstance(answer, str) and answer.strip() != prompt.strip():
            answer = answer.removeprefix(prompt)
    asked = [] if prompt is None else _prompt(columns, names)
    is_text = isinstance(answer, str)
    answered = [_said("assistant", answer)] if is_text else _turns(answer, names)
    before, after = [turn.message for turn in asked], [turn.message for turn in answered]
    sizes = range(min(len(before), len(after)), 0, -1)
    same = next((size for size in sizes if before[-size:] == after[:size]), 0)
    if before and not same and any(message["role"] == "user" for message in after):
        raise ValueError("messages: the answer begins with another question than the prompt")
    turns = asked + answered[same:]
    last = max((i for i, turn in enumerate(turns) if turn.message["role"] == "user"), default=-1)
    for turn in turns[: last + 1]:
        if turn.message["role"] == "assistant":
            turn.message["learned"] = False
    return turns


def _said(role: str, content: Any) -> _Turn:
    return _Turn({"role": role, "content": content})


def _turns(value: Any, names: _Names) -> list[_Turn]:
    """The messages of a column. A call of tools joins the message of the assistant before it."""
    turns = list[_Turn]()
    for i, raw in enumerate(_objects("messages", value)):
        try:
            turn = _turn(raw, names)
        except ValueError as error:
            raise ValueError(f"messages[{i}]: {error}") from error
        message, before = turn.message, turns[-1].message if turns else {}
        same = before.get("role") == "assistant" and before.get("learned") == message.get("learned")
        if turn.is_call and same:
            calls = [*before.get("tool_calls", ()), *message.get("tool_calls", ())]
            turn = _Turn(before | {"tool_calls": calls}, turns.pop().ignored | turn.ignored)
        turns.append(turn)
    return turns


def _turn(raw: Mapping[str, Any], names: _Names) -> _Turn:
    """A message of any form. Raises ValueError for one that says a thing twice, or asks the impossible."""
    said, spoken = dict[str, Any](), dict[str, str]()  # of each of MESSAGE_KEYS: its value, and its key here
    ignored = set[str]()
    for key, value in raw.items():
        if value is None or (isinstance(value, str | list | dict) and not value):
            continue
        meaning = names.keys.get(key)
        if meaning is None:
            if key in _REFUSED:
                raise ValueError(f"{key} {_REFUSED[key]}")
            ignored |= {key} - _HARMLESS
            continue
        if said.setdefault(meaning, value) != value:
            raise ValueError(f"{spoken[meaning]} and {key} differ, and both are its {meaning}")
        if meaning in ("weight", "masked") and not _is_flag(value):
            shown = value if isinstance(value, int | float) else f"of type {type(value).__name__}"
            raise ValueError(f"{key} is {shown}; only 0 and 1, or false and true, are possible")
        spoken[meaning] = key
    role = said.get("role")
    role = names.roles.get(role, role) if isinstance(role, str) else role
    content = said.get("content", next((raw[key] for key in raw if names.keys.get(key) == "content"), None))
    is_learned = said.get("weight", 1) == 1 and said.get("masked", 0) == 0
    calls = _calls(said.get("tool_calls"))
    if role == "function_call":
        calls, content = _calls(content), ""
    message = {"role": role, "content": _joined(content) if isinstance(content, list) else content}
    if role in ("assistant", "function_call"):
        message["role"] = "assistant"
        message |= {"reasoning_content": said["reasoning_content"]} if "reasoning_content" in said else {}
        message |= {"tool_calls": calls} if calls else {}
        message |= {} if is_learned else {"learned": False}
    elif role in ("system", "user", "tool"):
        of_assistant = {"reasoning_content", "tool_calls", *(("weight", "masked") if is_learned else ())}
        ignored |= {f"{spoken[meaning]} of {role}" for meaning in of_assistant & said.keys()}
    return _Turn(message, frozenset(ignored), role == "function_call")


def _calls(value: Any) -> list[dict[str, Any]]:
    """Calls of tools: a list of them, or one alone; either may be JSON."""
    found = _parsed("its tool_calls", value)
    return _objects("its tool_calls", [found] if isinstance(found, dict) else found)


def _is_flag(value: Any) -> bool:
    return isinstance(value, int | float) and value in (0, 1)


def _joined(parts: list[Any]) -> str:
    """The text of a content in parts, end to end, as Qwen's templates for images and text join it."""
    for part in parts:
        is_object = isinstance(part, dict)
        kind = (part.get("type") or "text") if is_object else type(part).__name__
        if not is_object or kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"its content has a part of type {kind}; only objects of type text are read")
    return "".join(part["text"] for part in parts)


def _text(name: str, value: Any) -> str:
    """The text of a column, empty for null. Raises ValueError for another value."""
    if not isinstance(value, str | None):
        raise ValueError(f"messages: {name} is of type {type(value).__name__}, not text")
    return value or ""


def _objects(name: str, value: Any) -> list[dict[str, Any]]:
    """A list of objects, each or all of which may be JSON; empty for null. Raises ValueError for others."""
    items = [_parsed(name, item) for item in _list(name, value)]
    if not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{name}: not a list of objects")
    return items


def _list(name: str, value: Any) -> list[Any]:
    """A list, which may be JSON; empty for null and for a blank text. Raises ValueError for another value."""
    found = _parsed(name, value)
    if not isinstance(found, list | None):
        raise ValueError(f"{name}: not a list")
    return found or []


def _parsed(name: str, value: Any) -> Any:
    """What a text holds as JSON, null for a blank one; another value as it is."""
    try:
        return value if not isinstance(value, str) else json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: a text that is not JSON ({error})") from error
