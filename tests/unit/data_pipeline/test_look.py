"""What `look` says of a file: columns, how a run reads it, bad rows, rows as a model sees them, lengths."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from rich.text import Text

from data_pipeline.config import DataConfig, DataError
from data_pipeline.look import LEARNED, look
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import Tokenizer, train_tokenizer

CORPUS = Path(__file__).parents[4] / "shared" / "data" / "corpus"
TALK = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], "id": 1}
OTHER = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "score": 3}]}


NAMES = ["ünï.jsonl", "数.jsonl", "${x}.jsonl", "back\\slash.jsonl", "a 'b\".jsonl", "tab\tx.jsonl"]
NAMES += ["null.jsonl", "1e5.jsonl", "2024.jsonl", "nan.jsonl", "on.jsonl", "2024-13-45.jsonl"]


def said(path: Path, config: DataConfig, tokenizer: Tokenizer | None = None, in_colour: bool = False) -> Text:
    return Text().join(look(str(path), config, tokenizer, in_colour))


def lines(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_conversations_are_shown_as_they_are_learned(data_config, tmp_path):
    path = lines(tmp_path / "my talk.jsonl", [TALK, "", OTHER, {"messages": "oops"}, "{"])
    shown = said(path, data_config)
    assert f"{path}: jsonl, {path.stat().st_size} bytes, 5 rows" in shown.plain
    assert "columns  messages: list, id: int, conversations: list" in shown.plain
    assert "read as  kind sft, form messages in 2 rows, form sharegpt in 1 rows" in shown.plain
    assert "bad      2 rows: 1 x messages: a text that is not JSON" in shown.plain
    assert "1 x json: " in shown.plain
    assert "not used score (1)" in shown.plain
    answer = "<think>\n\n</think>\n\n4<|im_end|>"
    assert f"[-<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n-]{answer}[-\n-]" in shown.plain
    coloured = said(path, data_config, in_colour=True)
    learned = [coloured.plain[span.start : span.end] for span in coloured.spans if span.style == LEARNED]
    assert learned == [answer, "<think>\n\n</think>\n\nHello<|im_end|>"]
    assert "[-" not in coloured.plain
    assert "lengths of 2 documents in characters" in coloured.plain


def test_the_line_of_yaml_reads_the_file(data_config, tmp_path, repository):
    table = datasets.Dataset.from_list(
        [{"code of": "def f():\n  return 1\n" * n, "path": "a"} for n in range(1, 40)]
    )
    table.to_parquet(tmp_path / "it's 1.parquet")
    shown = said(tmp_path / "it's 1.parquet", data_config).plain
    [line] = [line for line in shown.splitlines() if line.startswith("in a file of conf/")]
    sources = yaml.safe_load(line.partition("conf/")[2])["data"]["sources"]
    [(name, source)] = sources.items()
    assert (name, source["kind"], source["text_key"]) == ("it_s_1", "parquet", "code of")
    [line] = [line for line in shown.splitlines() if line.startswith("on a command line")]
    run = f"PYTHONPATH={repository} {sys.executable} -m data_pipeline name=x data=jsonl data.dir=x"
    given = f"{run} {line.partition('line')[2]} --cfg job"
    done = subprocess.run(["bash", "-c", given], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert yaml.safe_load(done.stdout)["data"]["sources"] == sources
    of_run = {name: type(next(iter(data_config.sources.values())))(**source)}
    manifest = prepare(replace(data_config, sources=of_run), 512, 0)
    assert sum(shard.documents for shard in manifest.shards()) == 39


@pytest.mark.parametrize("name", NAMES)
def test_both_lines_name_the_file(data_config, tmp_path, name):
    """As YAML, and as an override that Hydra reads."""
    path = lines(tmp_path / name, [TALK])
    shown = said(path, data_config).plain.splitlines()
    [in_file] = [line.partition("conf/")[2] for line in shown if line.startswith("in a file of conf/")]
    [given] = [line.partition("line")[2] for line in shown if line.startswith("on a command line")]
    override = OverridesParser.create().parse_override(shlex.split(given)[0]).value()
    for sources in (OmegaConf.create(yaml.safe_load(in_file)).data.sources, OmegaConf.create(override)):
        assert [of.paths[0] for of in sources.values()] == [str(path)]
        assert all(isinstance(source, str) for source in sources)


@pytest.mark.parametrize("column", ["1", "1e5", "2024-13-45", "null", "true"])
def test_a_column_is_named_by_a_text(data_config, tmp_path, column):
    shown = said(lines(tmp_path / "a.jsonl", [{column: "some text"}]), data_config).plain
    assert f'text_key: "{column}"' in shown


def test_texts_of_benchmarks_are_told_apart_from_bad_rows(data_config, tmp_path):
    question = " ".join(f"word{n}" for n in range(13))
    (tmp_path / "test.txt").write_text(question)
    path = lines(tmp_path / "a.jsonl", [{"text": question}, {"text": "else"}])
    shown = said(path, replace(data_config, exclude=[f"{tmp_path}/test.txt"])).plain
    assert "left out 1 rows: 1 x contaminated: data.exclude has " in shown
    assert "bad " not in shown


def test_lengths_are_those_of_the_tokenizer(data_config, tmp_path):
    tokenizer = Tokenizer(train_tokenizer(["one two three\n" * 50], 300), "tokenizer")
    rows = [{"text": "one two three\n" * n} for n in (1, 1, 1, 5, 40)]
    shown = said(lines(tmp_path / "a.jsonl", rows), data_config, tokenizer).plain
    sizes = [len(tokenizer.encode(row["text"])) for row in rows]
    assert f"lengths of 5 documents in tokens: mean {sum(sizes) / 5:,.0f}, longest {max(sizes)}" in shown
    bars = [line.split() for line in shown.splitlines() if line.startswith("  up to")]
    counts = {int(bar[2].replace(",", "")): int(bar[3]) for bar in bars}
    previous = 0
    for power in sorted(counts):
        assert counts[power] == sum(previous < size <= power for size in sizes)
        previous = power
    assert sum(counts.values()) == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "it has no row"),
        (
            "a.json",
            '[{"text": "a"}]\n',
            "of type list, not an object; one row a line: jq -c .[] FILE",
        ),
        ("a.jsonl", "{\n", "not read json: "),
        ("a.json", '[\n{"text":\n"a"}]\n', "; one row a line: jq -c .[] FILE"),
        ("a.json", '{\n"text":\n"a"}\n', "; one row a line: jq -c . FILE"),
        ("a.jsonl", '{"n": 1}\n', "looked for columns of text or lists"),
    ],
)
def test_what_cannot_be_read_says_why(data_config, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    assert message in said(tmp_path / name, data_config).plain


def test_a_terminal_obeys_nothing_in_a_row(data_config, tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": "a\x1b[2J\x07b\u202ec"}])
    shown = said(path, data_config).plain
    assert "a\ufffd[2Jb\ufffdc" in shown, "rich removes the bell"
    assert "\x1b" not in shown


def test_the_command_shows_every_file_and_fails_for_a_broken_one(tmp_path, repository):
    lines(tmp_path / "a.jsonl", [TALK])
    (tmp_path / "b.parquet").write_bytes(b"no table")
    (tmp_path / "c=1.txt").write_text("some text")
    run = [sys.executable, "-m", "data_pipeline", "look", "a.jsonl", "*.parquet", "c=1.txt", "none"]
    environment = {"PYTHONPATH": str(repository), "PATH": ""}
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "a.jsonl: jsonl" in done.stdout
    assert "c=1.txt: text" in done.stdout
    assert "some text" in done.stdout
    assert "b.parquet cannot be read as parquet" in done.stderr
    assert "none matches no file" in done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stdout


@pytest.mark.skipif(not CORPUS.is_dir(), reason="the shared corpus is not here")
def test_every_file_of_the_corpus_is_seen_or_refused_by_name(data_config):
    broken = CORPUS / "messy/corrupt.parquet"
    with pytest.raises(DataError, match=f"{broken} cannot be read as parquet"):
        said(broken, data_config)
    read = 0
    for path in (path for path in CORPUS.rglob("*") if path.is_file() and path != broken):
        shown = said(path, data_config).plain
        assert ("in a file of conf/" in shown) != ("not read" in shown), path
        read += "in a file of conf/" in shown
    assert read > 30
