"""Conversations are rendered as transformers renders them, by Qwen3's code and by templates in Jinja."""

import re
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from data_pipeline.chat import encode, render
from data_pipeline.config import CHAT_TEMPLATES, read_template
from data_pipeline.sandbox import JinjaTemplate
from data_pipeline.templated import Conversation, Template
from data_pipeline.tokenizer import Tokenizer, train_tokenizer

TEMPLATE = read_template("qwen3")
MARKED = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' -}}"
    "{%- if m.role == 'assistant' -%}{%- generation -%}{{- m.content + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- m.content + '<|im_end|>' -}}{%- endif -%}{{- '\\n' -}}{%- endfor -%}"
)
# what templates are given beside the messages, and how they are read
FEATURES = """  {% if tools %}
  {{ tools | tojson(indent=2) }}
  {{ tools | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}
  {% endif %}
{% for m in messages %}
    {% if loop.index0 == 1 %}{% continue %}{% endif %}
    {% if loop.index0 == 4 %}{% break %}{% endif %}
    {{ m.thinking }}|{{ m.reasoning_content }}|{{ m.content }}|{{ 'content' in m }}
{% endfor %}
{{ documents }} {{ nothing }} {{ dict(a=1) | tojson }} {{ add_generation_prompt }} {{ '<b>' | tojson }}
{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }} {{ strftime_now('%Y') }}
"""
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


def in_transformers(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    plain = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER._full, eos_token="<|endoftext|>")
    plain.pad_token = "<|endoftext|>"
    return plain.apply_chat_template(messages, chat_template=template, tokenize=False, **options)


TOKENIZER = Tokenizer(train_tokenizer(["the quick brown fox <|im_end|> /think"] * 3, 512), "trained")
TEMPLATES = {name: read_template(name) for name in CHAT_TEMPLATES} | {"features": FEATURES}


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize(
    "options",
    [{}, {"add_generation_prompt": True}, {"add_generation_prompt": True, "enable_thinking": False}],
)
@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_in_jinja(template: str, options: dict[str, bool], tools: list[dict] | None) -> None:
    text, equal = TEMPLATES[template], 0
    jinja = JinjaTemplate(text, "x")
    for messages in CONVERSATIONS.values():
        try:
            expected = in_transformers(text, messages, tools=tools, **options)
        except (TemplateError, TypeError) as error:
            with pytest.raises(ValueError, match=f"template: x:.*{re.escape(str(error))}"):
                Conversation(jinja, messages, tools).pieces(len(messages), [], **options)
            continue
        talk = Conversation(jinja, messages, tools)
        assert jinja.render(talk._messages, tools, options) == expected
        if template != "features":
            pieces = talk.pieces(len(messages), [], **options)
            assert "".join(piece.text or piece.control or "" for piece in pieces) == expected
        equal += 1
    assert equal > 6


def test_marks_of_answers() -> None:
    """The ids and the mask are those of transformers."""
    theirs = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER._full, chat_template=MARKED)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    for messages in (
        [ASKED, ANSWER],
        [SYSTEM, ASKED, ANSWER, said("user", "and?"), said("assistant", "b c")],
    ):
        expected = theirs.apply_chat_template(messages, **options)
        [pieces] = Template(MARKED, "x").samples({"messages": messages}, None)
        ids, loss = encode(pieces, TOKENIZER)
        assert ids.tolist() == expected["input_ids"]
        assert loss.tolist() == [bool(of) for of in expected["assistant_masks"]]
        assert loss.any()
