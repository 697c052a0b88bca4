"""A chat template in Jinja, rendered as transformers renders it. It runs in a sandbox with limits.

A template reaches neither files nor modules nor the internals of Python. It takes at most MOST_TURNS turns of
its loops and macros, and its output, sums, products and paddings hold at most MOST_CHARACTERS.
"""

import json
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.defaults import DEFAULT_FILTERS
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from data_pipeline.config import DataError

MOST_TURNS = 300_000  # some seconds
MOST_CHARACTERS = 1 << 26
_PADDING, _FORMAT = ("center", "indent", "format"), DEFAULT_FILTERS["format"]
STARTS, ENDS = "\ud800", "\ud801"  # enclose what {% generation %} does; no sound text holds lone surrogates
_HUGE_WIDTH = re.compile(r"%[^a-zA-Z%]*(\d{7}|\*)|:[^{}]*\d{7}")  # of the two ways to format


class JinjaTemplate:
    """A compiled template. Raises DataError, with the line, for a text that is no template.

    text: the template. origin: its file, which errors name.
    """

    def __init__(self, text: str, origin: str) -> None:
        self.text, self._origin = text, origin
        self._environment = _Environment()
        try:
            code = self._environment.compile(text, filename=origin)
        except Exception as error:  # RecursionError and others besides those of the library
            line = getattr(error, "lineno", None)
            raise DataError(f"{origin}:{line or 1}: not a chat template ({error}); correct it") from error
        made = self._environment.make_globals(None)
        self._template = self._environment.template_class.from_code(self._environment, code, made)
        self.marks_answers = self._environment.has_generation

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        options: Mapping[str, Any],
        *,
        marked: bool = False,
    ) -> str:
        """The text of a conversation, whose values are those of JSON.

        options: such as `add_generation_prompt` and `enable_thinking`. marked: put STARTS and ENDS around
        each {% generation %}. Raises ValueError, with file and line, for whatever fails in the template.
        """
        given: dict[str, Any] = {"tools": tools, "documents": None, "add_generation_prompt": False, **options}
        # transformers calls reasoning `thinking` too, and exported tokenizers have these special tokens
        thoughts = [
            {"thinking": of["reasoning_content"]} if "reasoning_content" in of else {} for of in messages
        ]
        given["messages"] = [{**more, **of} for more, of in zip(thoughts, messages, strict=True)]
        given["eos_token"] = given["pad_token"] = "<|endoftext|>"
        self._environment.start(marked)
        parts, size = list[str](), 0
        try:
            for part in self._template.generate(given):
                parts.append(part)
                size += len(part)
                _check_size(size)
        except Exception as error:  # a template may raise anything
            frames = [
                line for frame, line in traceback.walk_tb(error.__traceback__) if _is_in(frame, self._origin)
            ]
            why = f"{error}" or type(error).__name__
            raise ValueError(f"template: {self._origin}:{frames[-1] if frames else 1}: {why}") from error
        return "".join(parts)


def _is_in(frame: Any, origin: str) -> bool:
    return bool(frame.f_code.co_filename == origin)


def _check_size(size: int) -> None:
    if size > MOST_CHARACTERS:
        raise OverflowError(f"it makes more than {MOST_CHARACTERS:,} characters")


def _check_numbers(*values: Any) -> None:
    for value in values:
        _check_size(abs(value) if isinstance(value, int) else 0)


def _check_widths(form: Any) -> None:
    if isinstance(form, str) and _HUGE_WIDTH.search(form):
        raise OverflowError(f"the width in {form[:40]!r} is too large")


def _bounded(pads: Callable[..., str]) -> Callable[..., str]:
    """A filter that makes a text longer, with a limit."""

    def checked(text: Any, *given: Any, **named: Any) -> str:
        if pads is _FORMAT:
            _check_widths(text)
        else:
            _check_numbers(*given, *named.values())
        return pads(text, *given, **named)

    return checked


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - as the library has it

    def parse(self, parser: Parser) -> nodes.Node:
        self.environment.has_generation = True  # type: ignore[attr-defined]
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("said"), [], [], body).set_lineno(line)

    def said(self, caller: Callable[[], str]) -> str:
        return f"{STARTS}{caller()}{ENDS}" if self.environment.is_marked else caller()  # type: ignore[attr-defined]


class _Namespace(Namespace):
    """As in transformers: it keeps no names that begin with _."""

    def __init__(*given: Any, **named: Any) -> None:  # so that `self` may be a name in it
        self, *pairs = given
        Namespace.__init__(self)
        for name, value in dict(*pairs, **named).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


class _Environment(ImmutableSandboxedEnvironment):
    """The settings of transformers, and the limits."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters |= {"tojson": _to_json, **{name: _bounded(self.filters[name]) for name in _PADDING}}
        self.globals |= {"raise_exception": _raise, "strftime_now": datetime.now().strftime}
        self.globals |= {"namespace": _Namespace, "dict": lambda *pairs, **more: dict(*pairs, **more)}
        self.has_generation = False
        self.start(False)

    def start(self, is_marked: bool) -> None:
        """Begin a rendering."""
        self.is_marked, self._turns = is_marked, 0

    def count_turn(self) -> None:
        """Each loop and macro of a template calls this first."""
        self._turns += 1
        if self._turns > MOST_TURNS:
            raise OverflowError(f"it takes more than {MOST_TURNS:,} turns of its loops and macros")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        bodies: Iterator[Any] = tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))
        for node in bodies:
            count = nodes.Call(nodes.EnvironmentAttribute("count_turn"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(of) if hasattr(of, "__len__") else of for of in (left, right)]
        if operator == "%":
            _check_widths(left)
        elif operator == "+" and isinstance(left, str | list) and isinstance(right, str | list):
            _check_size(sizes[0] + sizes[1])
        elif operator == "*" and any(isinstance(of, str | list | tuple) for of in (left, right)):
            _check_size(sizes[0] * sizes[1])
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_size(left.bit_length() * right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, /, *given: Any, **named: Any) -> Any:
        if isinstance(getattr(called, "__self__", None), str):  # such as 'a'.center
            _check_numbers(*given, *named.values())
        return super().call(context, called, *given, **named)

    def wrap_str_format(self, value: Any) -> Any:
        if getattr(value, "__name__", None) in ("format", "format_map"):
            _check_widths(getattr(value, "__self__", None))
        return super().wrap_str_format(value)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`: unlike Jinja's own, it escapes no HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise TemplateError(message)
