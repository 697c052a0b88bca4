"""The inspect command shows what the model reads: text, borders, origins, and which tokens are learned."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.__main__ import main, show
from data_pipeline.config import DataConfig, DataError, SourceConfig
from data_pipeline.manifest import Manifest
from data_pipeline.packing import open_streams
from data_pipeline.prepare import prepare

SEED = 7


def test_a_row_of_text(prepared: DataConfig, corpus: Path) -> None:
    lines = show(prepared, "numbers:0", seq_len=256, seed=SEED).split("\n--- ")
    assert lines[0] == f"row 0: 256 tokens, {258 - len(lines)} targets; [- not learned -]"
    path = Manifest.load(Path(prepared.dir)).inputs["numbers"]
    for number, shown in enumerate(lines[1:]):
        origin, text = shown.split("\n", 1)
        assert f": numbers, document {number} from its token 0, " in origin
        file = next(entry.path for entry in path if entry.path in origin)
        whole = Path(file).read_text() + "<|endoftext|>"
        plain = text.replace("[-", "", 1).replace("-]", "", 1)
        assert whole.startswith(plain)
        assert text.startswith("[-")  # the first token of a document is not predicted
        if number < len(lines) - 2:
            assert plain == whole


def test_a_row_of_the_run_is_found_by_its_number(prepared: DataConfig) -> None:
    shown = [show(prepared, str(row), seq_len=64, seed=SEED) for row in range(12)]
    assert all(text.startswith(f"row {row}: 64 tokens") for row, text in enumerate(shown))
    sources = {name for name in prepared.sources if any(f": {name}, document " in text for text in shown)}
    assert sources == {"letters", "numbers"}
    assert show(prepared, "letters", seq_len=64, seed=SEED) == show(
        prepared, "letters:0", seq_len=64, seed=SEED
    )


def test_a_document_that_begins_with_the_last_target(prepared: DataConfig) -> None:
    folder = Path(prepared.dir)
    stream = open_streams(folder, Manifest.load(folder), "train", ["letters"])["letters"]
    [_, second, *_] = next(stream.document_offsets()).tolist()
    shown = show(prepared, "letters:0", seq_len=second, seed=SEED)
    assert shown.count("\n--- ") == 1  # the second document is not an input of the row


def test_a_row_of_a_source_under_length_shares(prepared: DataConfig, tmp_path: Path) -> None:
    copy = shutil.copytree(prepared.dir, tmp_path / "copy")
    plain = replace(prepared, packing="best_fit", dir=str(copy))
    joint = replace(plain, length_shares={1: 1.0})
    expected = show(plain, "letters:3", seq_len=64, seed=SEED)
    assert show(joint, "letters:3", seq_len=64, seed=SEED) == expected


def test_the_targets_of_a_conversation(data_config: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    source = SourceConfig("sft", [str(path)], None, 1.0, None)
    config = replace(data_config, sources={"chat": source}, validation_fraction=0.0, packing="best_fit")
    prepare(config, 512, SEED)
    text = show(config, "0", seq_len=128, seed=SEED)
    question = "[-<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n-]"
    assert f"{question}<think>\n\n</think>\n\n4<|im_end|>[-\n-]\n--- tokens" in text  # it is only a target
    assert f"chat, document 0 from its token 0, {path} at 0" in text
    assert text.endswith("to 128: padding")


def test_a_prompt_with_its_fields(data_config: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    rows = [{"prompt": f"{n}+{n}?", "answer": {"ü": 2 * n}} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    numbers = replace(data_config.sources["numbers"], weight=0.0)
    sources = {"numbers": numbers, "asked": SourceConfig("prompts", [str(path)])}
    config = replace(data_config, sources=sources, validation_fraction=0.0, skip=[[0, 2]])
    prepare(config, 512, SEED)
    third = show(config, "asked:3", seq_len=64, seed=SEED).split("\n")
    assert third[0].endswith(" tokens, none of them learned")
    assert third[0].startswith("prompt 3: ")
    assert third[1:] == [
        f"--- asked, document 3, {path} at {sum(len(json.dumps(row)) + 1 for row in rows[:3])}",
        *("<|im_start|>user", "3+3?<|im_end|>", "<|im_start|>assistant", ""),
        *("--- fields", 'prompt: "3+3?"', 'answer: {"ü": 6}'),
    ]
    shown = [show(config, str(row), seq_len=64, seed=SEED).split("\n") for row in range(9)]
    assert [lines[0].partition(":")[0] for lines in shown] == [f"prompt {row}" for row in range(2, 11)]
    assert third[1:] in [lines[1:] for lines in shown]
    assert show(config, "numbers:0", seq_len=64, seed=SEED).startswith("row 0: 64 tokens")
    with pytest.raises(DataError, match="asked: there is no such row as 9"):
        show(config, "asked:9", seq_len=64, seed=SEED)


@pytest.mark.parametrize("which", ["nobody", "letters:x", "letters:99999", "9" * 30])
def test_what_is_no_row(prepared: DataConfig, which: str) -> None:
    with pytest.raises(
        DataError, match=f"{which}.* (is not a row; give ROW, SOURCE or|there is no such row)"
    ):
        show(prepared, which, seq_len=64, seed=SEED)


def test_verify_command(prepared: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["verify", prepared.dir])
    assert (end.value.code, " is undamaged: " in capsys.readouterr().out) == (0, True)
    with pytest.raises(SystemExit) as end:
        main(["verify", str(tmp_path)])
    assert (end.value.code, "is missing: the data is not prepared" in capsys.readouterr().err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify"], "use\n  python -m data_pipeline verify FOLDER\n"),
        (["verify", "a", "b"], "use\n  python -m data_pipeline verify FOLDER\n"),
        (["inspect", "experiment=demo"], "use\n  python -m data_pipeline inspect ROW "),
        (["look", "data.tokenizer=a"], "use\n  python -m data_pipeline look FILES "),
        (["mine.jsonl"], "mine.jsonl is neither a command nor KEY=VALUE; use\n"),
        ([""], " is neither a command nor KEY=VALUE; use\n"),
    ],
)
def test_a_wrong_command_prints_the_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
