"""Conversations as Qwen3's chat template renders them, as pieces: text or a control token, learned or not.

Only the template makes control tokens. The content of a message always stays text, so a user who writes
`<|im_end|>` does not end the message.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.permutation import derive_key
from data_pipeline.tokenizer import Tokenizer

_MARKUP = re.compile(r"(<\|im_start\|>|<\|im_end\|>|</?think>|</?tool_call>|</?tool_response>)")
_FLAG = re.compile(r"(?<!\S)/(no_think|think)(?!\S)")
_RESPONSE = re.compile("<tool_response>.*</tool_response>", re.S)
_TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within"
    " <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)


class Piece(NamedTuple):
    """Text, or the name of one control token; exactly one of the two is set. loss: whether it is learned."""

    text: str | None
    control: str | None
    loss: bool


class Pieces(list[Piece]):
    """Pieces that are appended one by one."""

    def text(self, text: str, loss: bool = False) -> None:
        """Append text of a message. It joins a text piece before it, so that both are tokenized as one."""
        if text and self and self[-1].text is not None and self[-1].loss == loss:
            text = str(self.pop().text) + text
        if text:
            self.append(Piece(text, None, loss))

    def markup(self, template: str, loss: bool = False) -> None:
        """Append text of the template itself; control strings in it become control tokens."""
        for number, part in enumerate(_MARKUP.split(template)):
            if number % 2:
                self.append(Piece(None, part, loss))
            else:
                self.text(part, loss)


class Exchange(NamedTuple):
    """A question with its answer: messages query to end - 1. thinks: whether the answer has reasoning."""

    query: int
    end: int
    thinks: bool


def render(row: Mapping[str, Any], options: Mapping[str, Any], *, loss_from: int = 0) -> list[Piece]:
    """The pieces of a row's `messages` and `tools`; joined, they are what Qwen3's own template renders.

    row: as forms.py makes it. options: `add_generation_prompt` and `enable_thinking`, as the template defines
    them. The bodies of assistant messages from message number `loss_from` on are learned, each with its
    closing `<|im_end|>`, except messages whose `learned` is false.
    """
    messages = row["messages"]
    last_query = max(_queries(messages), default=len(messages) - 1)
    out = Pieces()
    if tools := row.get("tools"):
        out.markup("<|im_start|>system\n")
        if messages[0]["role"] == "system":
            out.text(_content(messages[0]) + "\n\n")
        out.markup(_TOOLS_BEFORE)
        for tool in tools:
            out.text("\n" + to_json(tool, ensure_ascii=False))
        out.markup(_TOOLS_AFTER)
    for i, message in enumerate(messages):
        role, content = message["role"], _content(message)
        if role == "user" or (role == "system" and not (tools and i == 0)):
            out.markup(f"<|im_start|>{role}\n")
            out.text(content)
            out.markup("<|im_end|>\n")
        elif role == "assistant":
            thinks = i > last_query and (i == len(messages) - 1 or bool(split_reasoning(message)[0]))
            out.markup("<|im_start|>assistant\n")
            _render_body(out, message, thinks, loss=i >= loss_from and is_learned(message))
            out.markup("\n")
        elif role == "tool":
            if i == 0 or messages[i - 1]["role"] != "tool":
                out.markup("<|im_start|>user")
            out.markup("\n<tool_response>\n")
            out.text(content)
            out.markup("\n</tool_response>")
            if i == len(messages) - 1 or messages[i + 1]["role"] != "tool":
                out.markup("<|im_end|>\n")
    if options.get("add_generation_prompt"):
        out.markup("<|im_start|>assistant\n")
        if options.get("enable_thinking") is False:
            out.markup("<think>\n\n</think>\n\n")
    return out


def samples(row: Mapping[str, Any], think_flag_share: float | None) -> list[list[Piece]]:
    """The training samples of a row: one per answer with reasoning, and one for later messages, if any.

    The template drops the reasoning of all answers but the last, so an answer with reasoning is learned as
    the last one of a sample. Every assistant message is learned in exactly one sample, or in none if its
    `learned` is false. think_flag_share: None leaves questions as they are; a number adds mode flags to them
    (arXiv 2505.09388, section 4.3; docs/data.md). Raises ValueError, with the reason, for a row that is
    malformed, has no target, or has an answer that contradicts its flag; for a lone surrogate, here and in
    `prompt`, this is a UnicodeEncodeError.
    """
    messages, exchanges = to_learn(row, think_flag_share)
    found, learned = [], 0
    for query, end, thinks in exchanges:
        ends = thinks or query == exchanges[-1].query
        if ends and any(is_learned(message) for message in messages[learned:end]):
            cut = {"messages": messages[:end], "tools": row.get("tools")}
            found.append(_sound(render(cut, {}, loss_from=learned)))
            learned = end
    return found


def to_learn(
    row: Mapping[str, Any], think_flag_share: float | None
) -> tuple[list[dict[str, Any]], list[Exchange]]:
    """Copies of a row's messages, with flags, and its exchanges. Arguments and errors: those of `samples`."""
    messages = _checked(row)
    queries = _queries(messages)
    exchanges = list[Exchange]()
    for query, until in zip(queries, [*queries[1:], len(messages)], strict=True):
        answers = [i for i in range(query, until) if messages[i]["role"] == "assistant"]
        if answers:
            thinks = any(split_reasoning(messages[i])[0] for i in answers)
            exchanges.append(Exchange(query, answers[-1] + 1, thinks))
    _apply_flags(messages, exchanges, think_flag_share)
    return messages, exchanges


def prompt(row: Mapping[str, Any], thinks: object) -> list[Piece]:
    """The messages of a row that wait for an answer, with the header of the answer; nothing is learned.

    thinks: false means that the answer begins after an empty think block; otherwise true or None. Raises
    ValueError, with the reason, for a prompt that is malformed or needs no answer.
    """
    options = {"add_generation_prompt": True, **to_answer(row, thinks)}
    return _sound(render(row, options, loss_from=len(row["messages"])))


def _sound(pieces: list[Piece]) -> list[Piece]:
    "".join(piece.text or "" for piece in pieces).encode()  # raises for a lone surrogate
    return pieces


def to_answer(row: Mapping[str, Any], thinks: object) -> dict[str, bool]:
    """What a template is told about thinking in an answer. Arguments and errors: those of `prompt`."""
    if not isinstance(thinks, bool | None):
        raise ValueError(f"type: enable_thinking is of type {type(thinks).__name__}")
    messages = _well_formed(row)
    if not _queries(messages):
        raise ValueError("messages: no question of a user")
    if (role := messages[-1]["role"]) not in ("user", "tool"):
        raise ValueError(f"messages: the last one has the role {role}; a prompt ends with user or tool")
    return {} if thinks is None else {"enable_thinking": thinks}


def encode(pieces: Sequence[Piece], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Ids of rendered pieces (uint32 [n]), and whether each id is learned (bool [n])."""
    ids, loss = list[int](), list[bool]()
    for text, control, learned in pieces:
        new = tokenizer.encode(text) if text is not None else [tokenizer.control_id(str(control))]
        ids += new
        loss += [learned] * len(new)
    return np.array(ids, dtype=np.uint32), np.array(loss, dtype=np.bool_)


def _render_body(out: Pieces, message: Mapping[str, Any], thinks: bool, loss: bool) -> None:
    reasoning, content = split_reasoning(message)
    if thinks:
        out.markup("<think>\n", loss)
        out.text(reasoning.strip("\n"), loss)
        out.markup("\n</think>\n\n", loss)
        content = content.lstrip("\n")
    out.text(content, loss)
    for number, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function") or call
        arguments = function["arguments"]
        if not isinstance(arguments, str):
            arguments = to_json(arguments, ensure_ascii=False)
        out.markup(("\n" if content or number else "") + '<tool_call>\n{"name": "', loss)
        out.text(function["name"] + '", "arguments": ' + arguments, loss)
        out.markup("}\n</tool_call>", loss)
    out.markup("<|im_end|>", loss)


def to_json(value: object, **options: Any) -> str:
    """Raises ValueError for a value that JSON cannot hold, such as a date in a table."""
    try:
        return json.dumps(value, **options)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"json: {error}") from error


def is_learned(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("learned") is not False


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def split_reasoning(message: Mapping[str, Any]) -> tuple[str, str]:
    """Reasoning and answer; the reasoning comes from its own field or from the content."""
    content, reasoning = _content(message), message.get("reasoning_content")
    if isinstance(reasoning, str):
        return reasoning, content
    if "</think>" not in content:
        return "", content
    before, after = content.split("</think>")[0], content.split("</think>")[-1]
    return before.rstrip("\n").split("<think>")[-1].lstrip("\n"), after.lstrip("\n")


def _queries(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of the user messages that are questions (some rows send tool responses with the role user)."""
    spoken = [(i, of.get("content")) for i, of in enumerate(messages) if of["role"] == "user"]
    return [i for i, content in spoken if isinstance(content, str) and not _RESPONSE.fullmatch(content)]


def _well_formed(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row, each of which is valid. Raises ValueError, with the fault, for another row."""
    messages, tools = row.get("messages"), row.get("tools")
    if not messages or not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("messages: not a list of objects")
    if tools is not None and not isinstance(tools, list):
        raise ValueError("tools: not a list")
    for i, message in enumerate(messages):
        if fault := _fault(message):
            raise ValueError(f"messages[{i}]: {fault}")
    return messages


def _checked(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Copies of the messages of a row that teaches. Raises ValueError, with the fault, for another row."""
    messages = _well_formed(row)
    first_answer = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), None)
    if first_answer is None:
        raise ValueError("no_target: no message of the assistant")
    if not any(is_learned(message) for message in messages):
        raise ValueError("no_target: no message of the assistant is to be learned")
    if not any(query < first_answer for query in _queries(messages)):
        raise ValueError(f"messages[{first_answer}]: the assistant speaks before the user")
    return [dict(message) for message in messages]


def _fault(message: dict[str, Any]) -> str | None:
    """The fault of a message; None for a valid one."""
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ("system", "user", "assistant", "tool"):
        known = "system, user, assistant, tool"
        return f"role {role!r} is not one of {known}; name what it is by `roles` of the source"
    if not isinstance(content, str) and not (role == "assistant" and content is None and calls):
        return f"content is of type {type(content).__name__}, not text"
    if role != "assistant":
        return None
    if not isinstance(message.get("reasoning_content"), str | None):
        return "reasoning_content is not text"
    if not isinstance(calls, list | None) or not all(_is_call(call) for call in calls or ()):
        return "tool_calls is not a list of objects with a name and arguments, an object or its JSON"
    reasoning, answer = split_reasoning(message)
    tags = [tag for tag in _MARKUP.findall(_content(message)) if tag.endswith("think>")]
    sound = list[str]()
    if message.get("reasoning_content") is None and _content(message).lstrip().startswith("<think>"):
        sound = ["<think>", "</think>"]
    elif message.get("reasoning_content") is None and reasoning.strip():
        sound = ["</think>"]  # the prompt has opened the block
    if tags != sound or _MARKUP.search(reasoning):
        return "template: <think> and </think> do not enclose the reasoning at the start"
    if not answer.strip() and not calls:
        return "no_target: the answer is empty"
    return None


def _is_call(call: Any) -> bool:
    function = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return False
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return False
    return isinstance(function.get("name"), str) and isinstance(arguments, dict)


def _apply_flags(
    messages: list[dict[str, Any]], exchanges: list[Exchange], think_flag_share: float | None
) -> None:
    """Add mode flags to the questions. Raises ValueError if an answer contradicts its flag."""
    mode, start = None, 0  # mode: that of the last flag in a system or user message
    for query, end, thinks in exchanges:
        asked = [m["content"] for m in messages[start : query + 1] if m["role"] in ("system", "user")]
        flags = _FLAG.findall("\n".join(asked))
        mode = flags[-1] if flags else mode
        if think_flag_share is not None and not flags:
            wanted = "think" if thinks else "no_think"
            key = derive_key(0, to_json(messages, sort_keys=True, default=str), query)
            if not thinks or mode == "no_think" or key < think_flag_share * 2**64:
                messages[query]["content"] += f" /{wanted}"
                mode = wanted
        if mode is not None and thinks != (mode == "think"):
            found = "reasoning" if thinks else "no reasoning"
            raise ValueError(f"messages[{query}]: the last flag is /{mode}, but the answer has {found}")
        start = end
