"""Conversations are rendered as transformers renders them with Qwen3's own template."""

from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from data_pipeline.chat import render

TEMPLATE = (Path(__file__).parents[2] / "data_pipeline/templates/qwen3.jinja").read_text()
TOOLS = [
    {"name": "größe", "parameters": {"a": 1, "<b>": "&"}},
    {"type": "function", "function": {"name": "f"}},
]


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM, ASKED, ANSWER = said("system", "S"), said("user", "q?"), said("assistant", "a")
THOUGHT = said("assistant", "b", reasoning_content="\nbecause\n")
WRITTEN = said("assistant", "<think>\nbecause\n</think>\n\nb")
CALLS = said("assistant", "", tool_calls=[call("größe", {"x": "é"}), call("f", '{"y": 2}')])
BOTH = said("assistant", "I look", tool_calls=[call("f", {})], reasoning_content="hm")
RESULTS = [said("tool", "1"), said("tool", "two\nlines")]
SENT = said("user", "<tool_response>\n3\n</tool_response>")
CONVERSATIONS = {
    "question": [ASKED],
    "system": [SYSTEM, ASKED, ANSWER],
    "two answers": [ASKED, THOUGHT, said("user", "and?"), ANSWER],
    "two thoughts": [ASKED, THOUGHT, said("user", "and?"), THOUGHT],
    "reasoning in the content": [ASKED, WRITTEN, said("user", "and?"), WRITTEN],
    "one tool": [ASKED, BOTH, RESULTS[0], ANSWER],
    "two tools": [SYSTEM, ASKED, CALLS, *RESULTS, THOUGHT],
    "tools twice": [ASKED, BOTH, *RESULTS, BOTH, *RESULTS, ANSWER, said("user", "thanks"), ANSWER],
    "tool responses of a user": [ASKED, CALLS, SENT, THOUGHT],
    "late system": [ASKED, ANSWER, SYSTEM, said("user", "é\n"), ANSWER],
    "ends with tools": [ASKED, CALLS, *RESULTS],
}


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize(
    "options", [{}, {"add_generation_prompt": True}, {"enable_thinking": False}], ids=str
)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(name: str, options: dict[str, bool], tools: list[dict] | None) -> None:
    messages = CONVERSATIONS[name]
    options = {"add_generation_prompt": "enable_thinking" in options, **options}
    [expected], _ = render_jinja_template([messages], tools=tools, chat_template=TEMPLATE, **options)
    pieces = render({"messages": messages, "tools": tools}, options)
    assert "".join(piece.text or piece.control or "" for piece in pieces) == expected
