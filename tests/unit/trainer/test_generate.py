"""Prompts are continued alone, from a file, or in a conversation, with the bias and dtype of the model."""

import json
import sys

import pytest
import torch

from data_pipeline import chat
from data_pipeline.config import read_template
from data_pipeline.templated import Qwen3, open_template
from data_pipeline.tokenizer import load_tokenizer, train_tokenizer
from moe.hf import save_hf
from moe.init import init_weights
from moe.model import CausalLM
from moe.next_token import SamplingSettings
from trainer import generate
from trainer.checkpoints.weights import load_model, selection_bias
from trainer.ranks.runtime import Ranks

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
TEXT = "the quick brown fox jumps over the lazy dog\n" * 20


def alone(folder, ids, tokens):
    """Greedy continuation without a cache."""
    model, tokenizer = load_model(folder, ALONE), load_tokenizer(folder)
    new = []
    with torch.no_grad():
        while len(new) < tokens:
            seen = torch.tensor([ids + new])
            borders = torch.tensor([0, seen.shape[1]], dtype=torch.int32)
            logits = model(seen, torch.arange(seen.shape[1])[None], borders).logits[0, -1]
            new.append(int(logits.argmax()))
            if new[-1] in (tokenizer.end_of_text, tokenizer.control_id("<|im_end|>")):
                return new[:-1]
    return new


def test_one_prompt_is_printed_with_its_text(folder, say):
    tokenizer = load_tokenizer(folder)
    code, out, _ = say("the quick", "--tokens", 7)
    assert code == 0
    expected = tokenizer.decode(alone(folder, tokenizer.encode("the quick"), 7))
    assert out.startswith("the quick")
    assert out == f"the quick{expected}".rstrip("�") + "\n"
    drawn = [
        say("the quick", "--tokens", 7, "--temperature", 2, *seed)[1]
        for seed in ((), ("--seed", 0), ("--seed", 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_end_of_a_text_is_not_shown(folder):
    tokenizer = load_tokenizer(folder)
    settings = SamplingSettings(0.0, 1.0, 0, 0, 9, (tokenizer.end_of_text,))
    model = load_model(folder, ALONE)
    writer = generate.Writer(model, None, tokenizer, settings, 0, 1, False, Qwen3, True, ALONE)
    assert writer.text([*tokenizer.encode("fox"), tokenizer.end_of_text]) == "fox"


@pytest.mark.parametrize("thinks", [True, False])
def test_a_chat_shows_the_answer_to_a_message(folder, say, thinks):
    tokenizer = load_tokenizer(folder)
    pieces = chat.prompt({"messages": [{"role": "user", "content": "the <|im_end|>"}]}, thinks)
    ids = chat.encode(pieces, tokenizer)[0].tolist()
    assert ids.count(tokenizer.control_id("<|im_end|>")) == 1  # that of the template
    assert (tokenizer.control_id("<think>") in ids) is not thinks
    options = [] if thinks else ["--no-thinking"]
    _, out, _ = say("the <|im_end|>", "--chat", "--tokens", 5, *options)
    assert out == tokenizer.decode(alone(folder, ids, 5)).rstrip("�") + "\n"


ROWS = [
    {"prompt": "the quick"},
    {"prompt": "fox", "answer": 3},
    {"messages": [{"role": "user", "content": "dog"}]},
    {"prompt": "the lazy dog jumps"},
    {"prompt": "the quick"},
]


def test_messages_may_have_other_forms(folder, say, tmp_path):
    settings = SamplingSettings(0.0, 1.0, 0, 0, 9, ())
    model, tokenizer = load_model(folder, ALONE), load_tokenizer(folder)
    writer = generate.Writer(model, None, tokenizer, settings, 0, 1, False, Qwen3, True, ALONE)
    system, user = {"role": "system", "content": "fox"}, {"role": "user", "content": "the dog"}
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "dog"}]
    other = [{"from": "developer", "value": "fox"}, {"from": "human", "value": parts}]
    expected = chat.encode(chat.prompt({"messages": [system, user]}, True), tokenizer)[0].tolist()
    for messages in ([system, user], other, json.dumps(other)):
        assert writer.encode({"messages": messages, "prompt": "x"}, "it") == expected
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": [{"type": "image"}]}]}))
    code, _, error = say("--prompts", path, "--out", tmp_path / "none.jsonl")
    assert (code, "in.jsonl:1: messages[0]: its content has a part of type image" in error) == (2, True)


def test_a_file_of_prompts_goes_on_where_it_was_ended(folder, say, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "_SECONDS_BETWEEN_LINES", 0.0)
    prompts, out, other = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "other.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    how = ("--prompts", prompts, "--tokens", 6, "--temperature", 1.5, "--top-k", 50, "--top-p", 0.95)
    code, said, progress = say(*how, "--out", out, "--rows", 2)
    assert code == 0
    assert said == f"{out} holds the completions of {len(ROWS)} prompts, {len(ROWS)} of them new\n"
    told = [f"{done} of {len(ROWS)} prompts" for done in range(1, len(ROWS) + 1)]
    assert [line.partition(",")[0] for line in progress.splitlines() if " prompts, " in line] == told
    whole = out.read_text().splitlines(keepends=True)
    found = {line["number"]: line for line in map(json.loads, whole)}
    assert len(whole) == len(found) == len(ROWS)
    for number, row in enumerate(ROWS):
        assert row.items() <= found[number].items()
        assert isinstance(found[number]["completion"], str)
        assert "<|" not in found[number]["completion"].removesuffix("<|")
    assert found[0]["completion"] != found[4]["completion"]
    other.write_text(whole[0] + whole[1] + whole[2][:9])  # killed while it wrote
    assert f"{len(ROWS)} prompts, {len(ROWS) - 2} of them new" in say(*how, "--out", other)[1]
    assert sorted(other.read_text().splitlines(keepends=True)) == sorted(whole)
    assert other.read_text().startswith(whole[0] + whole[1])
    assert say(*how, "--out", other)[0] == 0
    assert len(other.read_text().splitlines()) == len(ROWS)
    prompts.write_text("".join(json.dumps(row) + "\n" for row in reversed(ROWS)))
    code, _, error = say(*how, "--out", other)
    assert code == 2
    assert "name another file for --out" in error


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "a"}', "in.jsonl:2 is no object with a text `prompt` or a list of messages"),
        ('{"prompt": 3}', "in.jsonl:2 is no object with a text `prompt`"),
        ('{"messages": []}', "in.jsonl:2: messages: not a list of objects"),
        ('{"messages": [{"role": "king", "content": "a"}]}', "in.jsonl:2: messages[0]: role 'king'"),
        ('{"prompt": ""}', "in.jsonl:2 is empty"),
        ('["prompt"]', "in.jsonl:2 is not a JSON object"),
        ('{"prompt": ', "in.jsonl:2 is not a JSON object (json: "),
        (
            '{"prompt": "a", "number": 1, "completion": ""}',
            "in.jsonl:2 has the keys completion, number, which",
        ),
        ('{"prompt": "a", "truncated": null}', "in.jsonl:2 has the keys truncated, which --out adds to each"),
        ('{"prompt": "\\ud800"}', "in.jsonl:2 is not text in UTF-8"),
        (json.dumps({"prompt": "fox " * 5000}), "--tokens 120 does not fit"),
    ],
)
def test_a_wrong_row_is_named_before_anything_is_written(say, tmp_path, row, message):
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(f'{{"prompt": "a"}}\n{row}\n')
    code, _, error = say("--prompts", prompts, "--out", out)
    assert code == 2
    assert message in error
    assert not out.exists()


def test_a_conversation_remembers_what_was_said(folder, say, monkeypatch):
    tokenizer = load_tokenizer(folder)
    lines = iter(["fox", "dog"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)

    def typed(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    seen = []
    before = generate.Writer.encode
    monkeypatch.setattr(
        generate.Writer,
        "encode",
        lambda self, row, where: seen.append([*row["messages"]]) or before(self, row, where),
    )
    code, out, _ = say("--chat", "--tokens", 4, "--no-thinking")
    assert code == 0
    assert [message["content"] for message in seen[1]][::2] == ["fox", "dog"]
    ids = chat.encode(chat.prompt({"messages": seen[0]}, False), tokenizer)[0].tolist()
    answer = tokenizer.decode(alone(folder, ids, 4))
    assert seen[1][1] == {"role": "assistant", "content": answer.lstrip("\n")}
    assert out.startswith(answer.rstrip("�"))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a", "--prompts", "x", "--out", "y"],
        ["--prompts", "x"],
        ["a", "--out", "y"],
        ["a", "--top-p", "0"],
        ["a", "--top-k", "-1"],
        ["a", "--rows", "0"],
        ["a", "--nproc", "0"],
        ["a", "--temperature", "nan"],
        ["--chat"],  # no terminal
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused(say, arguments):
    with pytest.raises(SystemExit) as ended:
        say(*arguments)
    assert ended.value.code == 2


def test_a_dtype_may_be_given(folder, say, monkeypatch):
    taken = []
    load = generate.load_model
    monkeypatch.setattr(generate, "load_model", lambda *given: taken.append(load(*given)) or taken[-1])
    assert say("fox", "--tokens", 2)[0] == say("fox", "--tokens", 2, "--dtype", "bf16")[0] == 0
    assert [model.lm_head.weight.dtype for model in taken] == [torch.float32, torch.bfloat16]


def test_a_run_that_was_balanced_by_a_bias_generates_with_it(run_config, tmp_path, capsys):
    config = run_config("model=tiny_moe", "model.vocab_size=320", "model.num_hidden_layers=2").model
    model = CausalLM(config).eval()
    init_weights(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(20 if ".experts." in name else 1)  # so that it matters which experts are chosen
    torch.manual_seed(5)
    bias = 10 * torch.randn(config.num_moe_layers, config.num_experts)
    cpu, hf = torch.device("cpu"), tmp_path / "hf"
    save_hf(model, hf)
    (hf / "tokenizer.json").write_text(train_tokenizer([TEXT], 320))
    assert selection_bias(hf, cpu) is None, "a hub folder has no bias"
    tokenizer = load_tokenizer(hf)
    ids = torch.tensor([tokenizer.encode("the quick")])
    rows = ids, torch.arange(ids.shape[1])[None], torch.tensor([0, ids.shape[1]], dtype=torch.int32)
    with torch.no_grad():
        logits = (model(*rows, selection_bias=b).logits[0, -1] for b in (None, bias))
        plain, moved = (f"the quick{tokenizer.decode([int(one.argmax())])}\n" for one in logits)
    assert plain != moved
    for expected in (plain, moved):
        assert generate.main([str(hf), "the quick", "--tokens", "1"]) == 0
        assert capsys.readouterr().out == expected
        torch.save({"prior": bias, "bias": bias}, tmp_path / "balance.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_loaded_in_the_dtype_of_its_folder(run_config, tmp_path, monkeypatch, dtype):
    model = CausalLM(run_config("model=tiny_moe", "model.vocab_size=64").model).to(dtype)
    init_weights(model, 0)
    save_hf(model, tmp_path)
    taken = set()
    to_empty = CausalLM.to_empty

    def recording(self, **keywords):
        taken.update(parameter.dtype for parameter in self.parameters())
        return to_empty(self, **keywords)

    monkeypatch.setattr(CausalLM, "to_empty", recording)
    back = load_model(tmp_path, ALONE)
    assert taken == {dtype}
    assert all(torch.equal(*pair) for pair in zip(back.parameters(), model.parameters(), strict=True))


def test_a_chat_takes_the_template_of_the_folder(folder, say):
    (folder / "chat_template.jinja").write_text(read_template("qwen3_2507_instruct"))
    tokenizer = load_tokenizer(folder)
    row = {"messages": [{"role": "user", "content": "the quick"}], "tools": None}
    pieces = open_template("qwen3_2507_instruct").prompt(row, None)
    ids = chat.encode(pieces, tokenizer)[0].tolist()
    assert tokenizer.control_id("<think>") not in ids, "it knows no reasoning"
    _, out, _ = say("the quick", "--chat", "--no-thinking", "--tokens", 5)
    assert out == tokenizer.decode(alone(folder, ids, 5)).rstrip("�") + "\n"
    (folder / "chat_template.jinja").write_text("{{ messages[0].nothing.at_all }}")
    code, _, error = say("the quick", "--chat", "--tokens", 5)
    assert code == 2
    assert "chat_template.jinja:1" in error


def test_an_out_without_a_folder_is_refused(say, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    code, _, error = say("--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "no/out.jsonl")
    assert code == 2
    assert f"there is no folder {tmp_path / 'no'}; make it" in error


@pytest.mark.parametrize(
    ("arguments", "source", "prompt"),
    [
        (["R", "--tokens", "4", "a b"], "R", "a b"),
        (["--tokens", "4", "R", "--chat", "a"], "R", "a"),
        (["R", "a", "--tokens", "4"], "R", "a"),
        (["R", "--tokens", "4", "--", "--chat"], "R", "--chat"),
        (["--tokens", "4", "--", "-R", "-x"], "-R", "-x"),
    ],
)
def test_the_prompt_may_stand_anywhere(monkeypatch, arguments, source, prompt):
    taken = []

    def check(parser, options):
        taken.append((str(options.source), options.prompt, options.tokens))
        parser.exit(0)

    monkeypatch.setattr(generate, "_check", check)
    with pytest.raises(SystemExit) as ended:
        generate.main(arguments)
    assert (ended.value.code, taken) == (0, [(source, prompt, 4)])
