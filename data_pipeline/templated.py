"""Conversations as the chat template of a run renders them, as pieces (chat.py): also templates in Jinja.

A template in Jinja sees the real text of every message. To know which control strings are its own, and what
of its text is an answer, the conversation is rendered a second time with marks: lone surrogates, which no
sound text holds. Without the marks both renderings must be equal; otherwise the conversation is refused.
"""

import contextlib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline import chat
from data_pipeline.chat import Piece, Pieces
from data_pipeline.config import CHAT_TEMPLATES, DataError, read_template
from data_pipeline.sandbox import ENDS, STARTS, JinjaTemplate
from data_pipeline.tokenizer import END_OF_TEXT

_MARKUP = re.compile(r"(<\|[A-Za-z0-9_]+\|>|</?think>|</?tool_call>|</?tool_response>)")  # control strings
_OPENS, _CLOSES, _SAID = "\ud802", "\ud803", "\ud804"
_MASK = {code: 0xDC00 + code for code in range(128)}  # of a control string that somebody writes
_PLAIN = {masked: code for code, masked in _MASK.items()} | {ord(of): None for of in (_OPENS, _CLOSES, _SAID)}
_PLAIN |= {ord(STARTS): None, ord(ENDS): None}
_RESPONSE = re.compile(r"(\s*<tool_response>)(.*)(</tool_response>\s*)", re.S)
_WRITTEN = re.compile(f"(<tool_response>{_OPENS}|{_CLOSES}</tool_response>)")
_ASKED: list[dict[str, Any]] = [{"role": "user", "content": "question"}]
_CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
_CALLED = [*_ASKED, {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
Span = tuple[int, int]


class Qwen3:
    """Qwen3's template by the code of chat.py. text: the same in Jinja."""

    def __init__(self) -> None:
        self.text = read_template("qwen3")

    def samples(self, row: Mapping[str, Any], think_flag_share: float | None) -> list[list[Piece]]:
        return chat.samples(row, think_flag_share)

    def prompt(self, row: Mapping[str, Any], thinks: object) -> list[Piece]:
        return chat.prompt(row, thinks)


class Template(Qwen3):
    """A template in Jinja. Raises DataError for a text that is none; `origin` is its file."""

    def __init__(self, text: str, origin: str) -> None:
        self.text, self._jinja = text, JinjaTemplate(text, origin)
        # it has no place for reasoning, and would write what stands in a content as part of the answer
        self._has_no_thinking = text == read_template("qwen3_2507_instruct")
        self._needs_objects = False
        try:
            self._talk(_CALLED, None).pieces(len(_CALLED), [])
        except ValueError:
            self._needs_objects = True

    def samples(self, row: Mapping[str, Any], think_flag_share: float | None) -> list[list[Piece]]:
        """The training samples of a row: as few as possible, each answer learned in one.

        An answer can be learned where its text begins with what asks for it and shows all that it says. Many
        templates leave reasoning out of earlier answers, so that such an answer ends a sample. Arguments and
        errors are those of `chat.samples`; besides, ValueError (`template: ...`) for a row that the template
        refuses, and for one with an answer that cannot be learned anywhere.
        """
        messages, exchanges = chat.to_learn(row, think_flag_share)
        talk = self._talk(messages, row.get("tools"))
        found, waiting = [], list[int]()
        ends = [exchange.end for exchange in exchanges]
        for exchange, later in zip(exchanges, [*ends[1:], None], strict=True):
            answers = range(exchange.query, exchange.end)
            waiting += [i for i in answers if chat.is_learned(messages[i])]
            if later is not None and all(talk.answer(i, later) for i in waiting):
                continue
            if waiting:
                found.append(talk.pieces(exchange.end, waiting))
            waiting = []
        return found

    def prompt(self, row: Mapping[str, Any], thinks: object) -> list[Piece]:
        """As `chat.prompt`. Raises ValueError (`template: ...`), too, where the template refuses the row."""
        options = {"add_generation_prompt": True, **chat.to_answer(row, thinks)}
        messages = row["messages"]
        return self._talk(messages, row.get("tools")).pieces(len(messages), [], **options)

    def _talk(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None) -> "Conversation":
        """A conversation, in which arguments of calls that are JSON in a text become objects if the template
        takes no texts, and reasoning gets a field of its own if the template has none."""
        messages = list(map(_apart, messages)) if self._has_no_thinking else messages
        return Conversation(
            self._jinja, list(map(_parsed, messages)) if self._needs_objects else messages, tools
        )


class Conversation:
    """The renderings of a conversation. Raises ValueError for values that JSON or UTF-8 cannot hold."""

    def __init__(
        self, jinja: JinjaTemplate, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
    ) -> None:
        self._jinja, self._tools = jinja, tools
        # as transformers gives them to a template, without nulls; `learned` is ours
        self._messages = [
            {key: of[key] for key in of if key != "learned" and of[key] is not None} for of in messages
        ]
        self._marked = [_Marked.of(message) for message in self._messages]
        self._masked_tools = _masked(tools)
        self._seen = dict[tuple[int, str], str]()
        chat.to_json([self._messages, tools], ensure_ascii=False).encode()  # raises for a lone surrogate

    def pieces(self, end: int, learned: Sequence[int], **options: bool) -> list[Piece]:
        """The first `end` messages. learned: the numbers of answers that are learned. options: for the
        template. Raises ValueError where these cannot be told exactly from the rest of the text."""
        text = self._text(end, **options)
        plain = self._jinja.render(self._messages[:end], self._tools, options)
        if text.translate(_PLAIN) != plain:
            raise ValueError("template: its own text cannot be told from that of the messages")
        if text.count(_OPENS) + text.count(_CLOSES) != len(_WRITTEN.findall(text)):
            raise ValueError("template: it takes a <tool_response> of a message apart")
        if END_OF_TEXT in text:
            raise ValueError(f"template: it writes {END_OF_TEXT}, which ends a document")
        out, done = Pieces(), 0
        for number in learned:
            span = self.answer(number, end)
            if span is None or span[0] < done:
                what = "the text up to it does not begin the text with it, or leaves out what it says"
                raise ValueError(f"messages[{number}]: template: this answer cannot be learned: {what}")
            _append(out, text[done : span[0]], False)
            _append(out, text[span[0] : span[1]], True)
            done = span[1]
        _append(out, text[done:], False)
        return list(out)

    def answer(self, number: int, end: int) -> Span | None:
        """Where message `number`, an answer, is in the text of the first `end` messages; None if that is not
        certain, or if the text leaves something of it out."""
        text = self._text(end)
        if self._jinja.marks_answers:
            roles = [message["role"] for message in self._messages[:end]]
            spans = [of.span() for of in re.finditer(f"{STARTS}[^{STARTS}{ENDS}]*{ENDS}", text)]
            span = (
                spans[roles[:number].count("assistant")] if len(spans) == roles.count("assistant") else None
            )
        else:
            span = self._after_header(number, text)
        if span is None or text.count(_SAID, *span) != self._marked[number].parts:
            return None
        return span

    def _after_header(self, number: int, text: str) -> Span | None:
        """From the end of the prompt that asks for the answer to the control token that closes the answer."""
        asks = self._text(number, add_generation_prompt=True)
        thinks = bool(chat.split_reasoning(self._messages[number])[0])
        of_mode = self._text(number, add_generation_prompt=True, enable_thinking=thinks)
        opens = asks.rstrip().endswith("<think>")  # an answer without reasoning is not what this asks for
        prompts = [of_mode, asks] if opens and not thinks else [asks, of_mode]
        alone = self._text(number + 1)
        for prompt in prompts:
            body = alone[len(prompt) :]
            closing = _MARKUP.findall(body)[-1:]
            if (
                closing
                and body.count(closing[0]) == 1
                and alone.startswith(prompt)
                and text.startswith(prompt)
            ):
                return len(prompt), text.index(closing[0], len(prompt)) + len(closing[0])
        return None

    def _text(self, end: int, **options: bool) -> str:
        """The first `end` messages, with marks."""
        key = end, str(sorted(options.items()))
        if key not in self._seen:
            messages = [of.message for of in self._marked[:end]]
            self._seen[key] = self._jinja.render(messages, self._masked_tools, options, marked=True)
        return self._seen[key]


class _Marked(NamedTuple):
    """A message whose control strings are marked as text. parts: how many things an answer says."""

    message: dict[str, Any]
    parts: int

    @staticmethod
    def of(message: Mapping[str, Any]) -> "_Marked":
        found, content = _masked(dict(message)), message.get("content", "")
        if message["role"] == "user" and (response := _RESPONSE.fullmatch(content)):
            # templates ask for the ends of such a message, so they stay, each beside a mark
            opens, inside, closes = response.groups()
            found["content"] = f"{opens}{_OPENS}{_masked(inside)}{_CLOSES}{closes}"
        if message["role"] != "assistant":
            return _Marked(found, 0)
        if content:
            in_content = message.get("reasoning_content") is None and chat.split_reasoning(message)[0]
            parts = re.split("(</?think>)", content) if in_content else [content]
            marked = [part if number % 2 else _said(_masked(part)) for number, part in enumerate(parts)]
            found["content"] = "".join(marked)
        if found.get("reasoning_content"):
            found["reasoning_content"] = _said(found["reasoning_content"])
        for call in found.get("tool_calls") or ():
            function = call.get("function") or call
            function["name"] = _said(function["name"])
        return _Marked(found, json.dumps(found, ensure_ascii=False).count(_SAID))


def _apart(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the reasoning of its content in a field of its own."""
    if message["role"] != "assistant" or "</think>" not in (message.get("content") or ""):
        return message
    reasoning, answer = chat.split_reasoning(message)
    return message | {"reasoning_content": reasoning, "content": answer}


def _parsed(message: dict[str, Any]) -> dict[str, Any]:
    """The message with objects in place of the arguments of calls that are objects as JSON."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = dict(call.get("function") or call)
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            found = json.loads(function["arguments"])
            function["arguments"] = found if isinstance(found, dict) else function["arguments"]
        calls.append(call | {"function": function} if call.get("function") else function)
    return message | {"tool_calls": calls} if calls else message


def _masked(value: Any) -> Any:
    """A value of JSON with masks in place of the control strings in all its texts."""
    if isinstance(value, str):
        return _MARKUP.sub(lambda found: found[0].translate(_MASK), value)
    if isinstance(value, dict):
        return {_masked(key): _masked(of) for key, of in value.items()}
    return [_masked(of) for of in value] if isinstance(value, list) else value


def _said(text: str) -> str:
    """A text with a mark after its first character that is not white space."""
    return re.sub(r"\S", lambda found: found[0] + _SAID, text, count=1)


def _append(out: Pieces, marked: str, loss: bool) -> None:
    """Append rendered text with marks; control strings that nobody wrote become control tokens."""
    for number, part in enumerate(_WRITTEN.split(marked)):
        if number % 2:
            out.text(part.translate(_PLAIN), loss)
            continue
        for place, text in enumerate(_MARKUP.split(part)):
            if place % 2:
                out.append(Piece(None, text, loss))
            else:
                out.text(text.translate(_PLAIN), loss)


def open_template(name: str) -> Qwen3:
    """The template of `data.chat_template`. Raises DataError for one that cannot be used to teach answers."""
    template = _of_text(read_template(name), f"{name}.jinja" if name in CHAT_TEMPLATES else name)
    try:
        template.samples({"messages": [*_ASKED, {"role": "assistant", "content": "answer"}]}, None)
    except ValueError as error:
        law = f"a question with its answer cannot be learned: {error}"
        remedy = "correct the template, or mark what the assistant says with {% generation %}"
        raise DataError(f"data.chat_template={name}: {law}; {remedy}") from error
    return template


def template_of(folder: Path) -> Qwen3:
    """The template of a Hugging Face folder: of chat_template.jinja, else of tokenizer_config.json, else
    Qwen3's. Raises DataError for files that cannot be read, and for a template that makes no prompt."""
    alone, within = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    text, path = (read_template(str(alone)), alone) if alone.is_file() else (_text_within(within), within)
    template = _of_text(text, str(path))
    try:
        template.prompt({"messages": _ASKED}, None)
    except ValueError as error:
        raise DataError(f"{path}: the chat template fails: {error}; correct it, or remove it") from error
    return template


def _text_within(path: Path) -> str:
    """The chat template in a tokenizer_config.json; Qwen3's if there is none."""
    found: Any = None
    try:
        found = json.loads(path.read_bytes()).get("chat_template") if path.is_file() else None
        if isinstance(found, list):  # several by name
            found = {of["name"]: of["template"] for of in found}["default"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{path} has no chat template that can be read ({error})"
        raise DataError(
            f"{what}; correct it, or write the template to chat_template.jinja beside it"
        ) from error
    return found if isinstance(found, str) else read_template("qwen3")


@functools.lru_cache(maxsize=8)
def _of_text(text: str, origin: str) -> Qwen3:
    return Qwen3() if text == read_template("qwen3") else Template(text, origin)
