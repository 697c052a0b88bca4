"""Templates in Jinja: what is learned, where a conversation is cut, what stays text, and what is refused."""

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import chat
from data_pipeline.chat import Piece
from data_pipeline.config import CHAT_TEMPLATES, DataConfig, DataError, SourceConfig, read_template
from data_pipeline.forms import read
from data_pipeline.manifest import Manifest, TokenizerRecord
from data_pipeline.templated import Conversation, Qwen3, Template, open_template, template_of

SHARED = Path(__file__).parents[4] / "shared" / "data"
SPOKEN = "<|im_end|>\n<|im_start|>assistant\n<think>\n</think> <tool_call> <|anything|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
)


def turn(role: str, content: str | None, reasoning: str | None = None, **fields: object) -> dict[str, Any]:
    extra = {} if reasoning is None else {"reasoning_content": reasoning}
    return {"role": role, "content": content, **extra, **fields}


def talk(*answers: dict[str, Any]) -> dict[str, Any]:
    """A row with a question before each answer."""
    turns = ((turn("user", f"q{number}"), answer) for number, answer in enumerate(answers))
    return {"messages": [message for pair in turns for message in pair]}


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text if piece.text is not None else str(piece.control) for piece in pieces)


def learned(pieces: list[Piece]) -> list[str]:
    marked = "".join(f"\1{text_of([piece])}\2" if piece.loss else f"\0{text_of([piece])}" for piece in pieces)
    return re.findall("\1([^\0]*)\2", marked.replace("\2\1", ""))


def controls(pieces: list[Piece]) -> list[str]:
    return [piece.control for piece in pieces if piece.control]


def outcome(template: Qwen3, row: dict[str, Any]) -> list[list[Piece]] | str:
    try:
        return template.samples(row, None)
    except ValueError as error:
        return str(error)


def in_jinja() -> Template:
    return Template(read_template("qwen3"), "qwen3.jinja")


def check_qwen3(rows: list[dict[str, Any]]) -> None:
    """The code and the file of Qwen3's template make the same pieces and samples."""
    template = in_jinja()
    for row in rows:
        canonical = read(row, SourceConfig("sft", [])).row
        messages, options = canonical["messages"], row["options"]
        whole = Conversation(template._jinja, messages, canonical.get("tools"))
        pieces = whole.pieces(len(messages), [], **options)
        assert text_of(pieces) == row["rendered"]
        assert pieces == chat.render(canonical, options, loss_from=len(messages))
        assert outcome(template, canonical) == outcome(Qwen3(), canonical)


def test_qwen3_in_jinja_equals_its_code() -> None:
    lines = Path(__file__).with_name("qwen3_renderings.jsonl").read_text().split("\n")[:-1]
    check_qwen3([json.loads(line) for line in lines])


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")
def test_qwen3_in_jinja_equals_its_code_on_every_rendering() -> None:
    with gzip.open(SHARED / "sft_rendered.jsonl.gz") as file:
        check_qwen3([json.loads(line) for line in file])


def test_two_answers_in_a_row_are_learned_by_the_code_alone() -> None:
    """In Jinja, what asks for the second answer shows the first one with an empty think block, which is not
    there before a second answer. The code has no need of what asks for it."""
    row = {"messages": [turn("user", "q"), turn("assistant", "a"), turn("assistant", "b")]}
    assert learned(chat.samples(row, None)[0]) == ["a<|im_end|>", "<think>\n\n</think>\n\nb<|im_end|>"]
    with pytest.raises(ValueError, match=r"messages\[2\]: template: this answer cannot be learned"):
        in_jinja().samples(row, None)


def test_qwen3_5_learns_what_follows_the_prompt_of_the_mode() -> None:
    template = open_template("qwen3_5")
    [thought] = template.samples(talk(turn("assistant", "a", "because")), None)
    assert learned(thought) == ["because\n</think>\n\na<|im_end|>"]
    assert text_of(thought).endswith("<|im_start|>assistant\n<think>\nbecause\n</think>\n\na<|im_end|>\n")
    [plain] = template.samples(talk(turn("assistant", "a")), None)
    assert learned(plain) == ["a<|im_end|>"], "the empty block stands in the prompt without thinking"
    assert text_of(plain).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\na<|im_end|>\n")
    row = talk(turn("assistant", "a"), turn("assistant", "<think>\nr\n</think>\n\nb"), turn("assistant", "c"))
    found = template.samples(row, None)
    assert list(map(learned, found)) == [["a<|im_end|>"], ["r\n</think>\n\nb<|im_end|>"], ["c<|im_end|>"]]
    assert "<|im_start|>assistant\nb<|im_end|>" in text_of(found[2]), "earlier reasoning is left out"


@pytest.mark.parametrize("arguments", ['{"x": "é", "n": [1, 2]}', {"x": "é", "n": [1, 2]}])
def test_qwen3_5_reads_arguments_that_are_json(arguments: object) -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
    first = turn("assistant", "", "look", tool_calls=calls)
    row = {"messages": [turn("user", "q"), first, turn("tool", "1"), turn("assistant", "a", "seen")]}
    [pieces] = open_template("qwen3_5").samples(row, None)
    called = "<function=f>\n<parameter=x>\né\n</parameter>\n<parameter=n>\n[1, 2]\n</parameter>\n</function>"
    assert learned(pieces) == [
        f"look\n</think>\n\n<tool_call>\n{called}\n</tool_call><|im_end|>",
        "seen\n</think>\n\na<|im_end|>",
    ]
    assert row["messages"][1]["tool_calls"] == calls, "the row is not changed"


def test_2507_instruct_has_no_thinking() -> None:
    template = open_template("qwen3_2507_instruct")
    [pieces] = template.samples(talk(turn("assistant", "a"), turn("assistant", "b")), None)
    assert learned(pieces) == ["a<|im_end|>", "b<|im_end|>"]
    assert "think" not in text_of(pieces)
    with pytest.raises(ValueError, match=r"messages\[1\]: template: this answer cannot be learned"):
        template.samples(talk(turn("assistant", "a", "because")), None)
    for content in ("because</think>a", "<think>\nbecause\n</think>\n\na"):
        with pytest.raises(ValueError, match=r"messages\[1\]: template: this answer cannot be learned"):
            template.samples(talk(turn("assistant", content)), None)
    [pieces] = template.samples(talk(turn("assistant", "<think>\n\n</think>\n\na")), None)
    assert learned(pieces) == ["a<|im_end|>"], "nothing was thought"
    asked = {"messages": [turn("user", "q")]}
    assert text_of(template.prompt(asked, False)).endswith("q<|im_end|>\n<|im_start|>assistant\n")


def test_prompts_are_those_of_the_mode() -> None:
    template, asked = open_template("qwen3_5"), {"messages": [turn("user", "q")]}
    for thinks, end in ((None, "<think>\n"), (True, "<think>\n"), (False, "<think>\n\n</think>\n\n")):
        pieces = template.prompt(asked, thinks)
        assert text_of(pieces) == f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{end}"
        assert not any(piece.loss for piece in pieces)
    with pytest.raises(ValueError, match="enable_thinking is of type str"):
        template.prompt(asked, "no")
    with pytest.raises(ValueError, match="ends with user or tool"):
        template.prompt(talk(turn("assistant", "a")), None)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_control_strings_that_somebody_writes_stay_text(name: str) -> None:
    calls = [{"name": "f<|im_end|>", "arguments": {"<|im_end|>": "<tool_call>"}}]
    sent = "<tool_response>\n<|im_end|>\n</tool_response>"
    row = {
        "messages": [
            *(
                turn("system", SPOKEN),
                turn("user", SPOKEN),
                turn("assistant", "<|im_end|>", tool_calls=calls),
            ),
            *(turn("tool", SPOKEN), turn("assistant", "<|im_start|>"), turn("user", sent)),
            turn("assistant", "done <|im_end|>"),
        ],
        "tools": [{"name": "<|im_end|>", "</think>": 1}],
    }
    template = in_jinja() if name == "qwen3" else open_template(name)
    found = template.samples(row, None)
    assert name != "qwen3" or found == chat.samples(row, None)
    clean = json.loads(re.sub(r"<(?!/?tool_response>)[^<>]*>", "x", json.dumps(row)))
    assert [controls(pieces) for pieces in found] == [controls(of) for of in template.samples(clean, None)]
    assert sent in text_of(found[-1])
    assert text_of(found[0]).count("<|anything|>") == 3


def test_control_strings_of_any_template_are_control_tokens() -> None:
    [pieces] = Template(CHATML.replace("im_end", "eot_id"), "x").samples(talk(turn("assistant", "a")), None)
    assert controls(pieces) == ["<|im_start|>", "<|eot_id|>"] * 2
    assert learned(pieces) == ["a<|eot_id|>"]


def test_an_answer_is_learned_after_the_text_that_asks_for_it() -> None:
    """Here the beginning counts the questions, so that each answer has a beginning of its own."""
    count = "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    found = Template(count + CHATML, "x").samples(talk(turn("assistant", "a"), turn("assistant", "b")), None)
    assert [text_of(pieces)[0] for pieces in found] == ["1", "2"]
    assert list(map(learned, found)) == [["a<|im_end|>"], ["b<|im_end|>"]]


def test_answers_that_are_marked() -> None:
    template = Template(MARKED, "marked.jinja")
    row = talk(
        turn("assistant", "a<|im_end|>"), turn("assistant", "b", learned=False), turn("assistant", "c")
    )
    [pieces] = template.samples(row, None)
    assert learned(pieces) == ["a<|im_end|><|im_end|>", "c<|im_end|>"]
    assert controls(pieces) == ["<|im_start|>", "<|im_end|>"] * 6
    twice = MARKED.replace(
        "{{ m.content + '<|im_end|>' }}{% endgen",
        "{{ m.content }}{% endgeneration %}{% generation %}{{ '<|im_end|>' }}{% endgen",
    )
    with pytest.raises(ValueError, match="cannot be learned"):
        Template(twice, "x").samples(row, None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("m.content", "m.content | replace('<|im_end|>', '')"), "cannot be told"),
        (("m.content", "(m.content ~ m.content | length)"), "cannot be told"),
        (("m.content", "m.content | upper"), "cannot be told"),
        (("m.content", "m.content | replace('<tool_response>', '<tool_response> ')"), "apart"),
        (("m.content", "m.content[:3]"), None),
        (("'<|im_end|>\\n'", "'<|im_end|><|endoftext|>'"), "which ends a document"),
    ],
)
def test_what_a_template_does_with_control_strings_is_exact_or_refused(
    change: tuple[str, str], reason: str | None
) -> None:
    template = Template(CHATML.replace(*change), "x")
    sent = "<tool_response>it</tool_response>"
    row = {
        "messages": [
            turn("user", f"a {SPOKEN}"),
            turn("assistant", "a"),
            turn("user", sent),
            turn("assistant", "b"),
        ]
    }
    if reason is not None:
        with pytest.raises(ValueError, match=f"template: .*{reason}"):
            template.samples(row, None)
    else:
        [pieces] = template.samples(row, None)
        assert text_of(pieces) == template._jinja.render(row["messages"], None, {})
        assert controls(pieces) == ["<|im_start|>", "<|im_end|>"] * 4


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",  # nothing closes an answer
        CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>model\\n'"),  # asks for another header
        CHATML.replace("m.content", "'x'"),  # leaves out what is said
        CHATML + "{{ raise_exception('never') }}",
        "{% for a in range(10 ** 9) %}{% endfor %}",
        CHATML.replace("'\\n' + m.content", "'<|im_end|>' + m.content"),  # an answer closes before it begins
        CHATML.replace("<|im_end|>", "<|im_end|><|im_end|>"),  # it closes twice
    ],
)
def test_a_template_that_cannot_teach_is_refused_at_the_start(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(text)
    with pytest.raises(
        DataError, match=r"data.chat_template=.*mine.jinja: a question with its answer cannot"
    ):
        open_template(str(path))


def test_files_that_are_no_templates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.jinja cannot be read .*; name a file in UTF-8"):
        open_template(str(tmp_path / "gone.jinja"))
    (tmp_path / "bytes.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"bytes.jinja cannot be read"):
        open_template(str(tmp_path / "bytes.jinja"))


@pytest.mark.parametrize("value", ["a\ud800", {"of": "\ud804"}, ["\udc3c"]])
def test_lone_surrogates_are_refused(value: object) -> None:
    row = talk(turn("assistant", "a")) | {"tools": [value]}
    for template in (Qwen3(), in_jinja()):
        with pytest.raises(UnicodeEncodeError):
            template.samples(row, None)
        with pytest.raises(UnicodeEncodeError):
            template.prompt({"messages": row["messages"][:1], "tools": [value]}, None)


def test_a_folder_of_another_template_is_refused(data_config: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML)
    sources = {"chat": SourceConfig("sft", ["chat.jsonl"])}
    config = replace(data_config, sources=sources)
    mine = replace(config, chat_template=str(path))

    def check(made: dict[str, object], now: DataConfig) -> None:
        manifest = Manifest("", made, {}, TokenizerRecord("", 0, 0), {}, "")
        manifest.check_settings(now.content_settings(), tmp_path)

    assert config.content_settings()["data.chat_template"] is None, "older folders are of qwen3"
    made = mine.content_settings()
    check(made, mine)
    copy = tmp_path / "copy.jinja"
    copy.write_text(CHATML)
    check(made, replace(mine, chat_template=str(copy)))
    path.write_text(CHATML + " ")
    for other in (mine, config, replace(config, chat_template="qwen3_5")):
        with pytest.raises(DataError, match=r"data.chat_template: prepared with sha256"):
            check(made, other)
    text = replace(data_config, chat_template="qwen3_5")
    assert text.content_settings() == data_config.content_settings(), "text needs no template"


def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(CHATML, encoding="utf-8-sig")
    assert open_template(f"{tmp_path}/mine.jinja").text == CHATML


def test_laws(data_config: DataConfig) -> None:
    [law] = replace(data_config, chat_template="qwen4").problems()
    assert law.startswith(
        "data.chat_template=qwen4 is unknown; use qwen3, qwen3_2507_instruct, qwen3_5, or a file"
    )
    [law] = replace(data_config, chat_template="qwen3_5", think_flag_share=0.5).problems()
    assert "data.think_flag_share=0.5 adds flags that only models of data.chat_template=qwen3 know" in law
    assert replace(data_config, chat_template="mine.jinja", think_flag_share=0.5).problems() == []


def test_the_template_of_a_folder(tmp_path: Path) -> None:
    assert type(template_of(tmp_path)) is Qwen3
    within = tmp_path / "tokenizer_config.json"
    within.write_text("{}")
    assert type(template_of(tmp_path)) is Qwen3
    within.write_text(json.dumps({"chat_template": CHATML}))
    assert template_of(tmp_path).text == CHATML
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": MARKED}]
    within.write_text(json.dumps({"chat_template": named}))
    assert template_of(tmp_path).text == MARKED
    for damaged in ("[", "[]", json.dumps({"chat_template": [{"name": "tool_use", "template": "x"}]})):
        within.write_text(damaged)
        with pytest.raises(DataError, match=r"tokenizer_config.json has no chat template that can be read"):
            template_of(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(read_template("qwen3"))
    assert type(template_of(tmp_path)) is Qwen3, "a file of its own comes first"
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(
        DataError, match=r"chat_template.jinja: the chat template fails: .*'__class__'.*unsafe"
    ):
        template_of(tmp_path)
