"""Real files with every kind of damage are read as the manifest beside them says.

The files are not part of the package: DATA_PIPELINE_TEST_DATA names their folder, by default `shared/data`
beside the repository. Without the folder these tests are skipped.
"""

import json
import os
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DataConfig, DataError, SourceConfig
from data_pipeline.documents import Document, Reject, read_documents
from data_pipeline.inputs import list_inputs
from data_pipeline.prepare import prepare
from data_pipeline.readers import plan_slices, read_rows
from data_pipeline.shards import TokenStream, verify
from data_pipeline.tokenizer import load_tokenizer

DATA = Path(os.environ.get("DATA_PIPELINE_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
MESSY = DATA / "corpus" / "messy"
pytestmark = pytest.mark.skipif(not MESSY.is_dir(), reason=f"{DATA} does not exist")
VOCAB_SIZE = 8192  # of the tokenizer beside the data
BAD_REASONS = {"type_or_json": "type|json", "utf8 or replace (str has surrogate; .encode() raises)": "utf8"}


def expectations(name: str) -> dict[int, str]:
    """Line -> `keep`, `dedup`, `skip` or `skip:CODE`; our choice where the manifest allows several."""
    found = {}
    for row in json.loads((MESSY / name).read_text()):
        expect = row["expect"]
        if row["kind"] == "utf8_cut_mid_codepoint?":
            expect = "keep"  # the row turns out to be valid UTF-8
        elif row["kind"] in ("starts_with_assistant", "sharegpt_roles"):
            expect = "skip"
        found[row["line"]] = expect
    return found


def config_of(data_config: DataConfig, sources: dict[str, SourceConfig], **settings: Any) -> DataConfig:
    settings |= {"tokenizer": str(DATA / "tokenizer" / "bpe8k.json"), "tokenizer_vocab_size": None}
    return replace(data_config, sources=sources, validation_fraction=0.0, min_characters=2, **settings)


def read(config: DataConfig, path: Path, kind: str = "jsonl") -> list[Document | Reject]:
    source = SourceConfig(kind, [str(path)], "text" if kind in ("jsonl", "parquet") else None, 1.0, None)
    config = config_of(config, {"s": source})
    parts = [part for slice in plan_slices(source, list_inputs("s", source, {}), 1 << 30) for part in slice]
    return [item for part in parts for item in read_documents(config, "s", read_rows(source, part))]


def rejects(items: list[Document | Reject]) -> list[str]:
    return [item.code for item in items if isinstance(item, Reject)]


@pytest.mark.parametrize("slice_bytes", [20_000, 1 << 30])
@pytest.mark.parametrize("on_bad_row", ["skip", "quarantine"])
def test_every_row_of_messy_jsonl(data_config: DataConfig, slice_bytes: int, on_bad_row: str) -> None:
    path = MESSY / "messy.jsonl"
    source = SourceConfig("jsonl", [str(path)], "text", 1.0, None)
    settings = {"slice_bytes": slice_bytes, "on_bad_row": on_bad_row}
    config = config_of(data_config, {"messy": source}, **settings)
    manifest = prepare(config, VOCAB_SIZE, 0)
    verify(Path(config.dir))

    lines = path.read_bytes().split(b"\n")
    offsets = [sum(len(line) + 1 for line in lines[:n]) for n in range(len(lines))]
    stream = TokenStream(Path(config.dir), manifest.sources["messy"].shards["train"])
    places = [stream.document_at(start) for offset in stream.document_offsets() for start in offset[:-1]]
    kept = {offsets.index(place.offset) + 1: place for place in places}
    bad = {
        reject["line"]: reject
        for reject in map(json.loads, (Path(config.dir) / "rejects.jsonl").read_text().splitlines())
    }
    tokenizer = load_tokenizer(config.dir)
    for line, expect in expectations("messy_manifest.json").items():
        action, _, code = expect.partition(":")
        if action.split(" ")[0].rstrip(";") == "keep":
            place = kept.pop(line)
            text = tokenizer.decode(stream.read(place.start, place.stop - 1).tolist())
            assert text == json.loads(lines[line - 1])["text"]
        elif code not in ("blank", "") and action == "skip":
            code = BAD_REASONS.get(code, re.split(r"[ (]", code)[0])
            reject = bad.pop(line)
            assert re.match(code, reject["reason"]), (line, expect, reject["reason"])
            assert reject["offset"] == offsets[line - 1]
            assert reject["head"].encode("utf-8", "surrogateescape") == (lines[line - 1] + b"\n")[
                :200
            ].rstrip(b"" if line < len(lines) else b"\n")
            assert ("row" in reject) == (on_bad_row == "quarantine")
        else:
            assert expect in ("skip:blank", "dedup")
            assert line not in kept
            assert line not in bad
    assert not kept
    assert not bad
    skipped = manifest.sources["messy"].skipped
    assert (skipped["blank"], skipped["duplicate"]) == (2, 2)


ROLES_OF_SHAREGPT = 16  # the line of a row with the roles human and gpt, which the list calls unknown


def test_every_row_of_messy_sft(data_config: DataConfig) -> None:
    source = SourceConfig("sft", [str(MESSY / "messy_sft.jsonl")], None, 1.0, None)
    config = config_of(data_config, {"chat": source}, max_chat_tokens=8192)
    prepare(config, VOCAB_SIZE, 0)
    bad = {}
    for reject in map(json.loads, (Path(config.dir) / "rejects.jsonl").read_text().splitlines()):
        bad[reject["line"]] = reject["reason"]
    for line, expect in (expectations("messy_sft_manifest.json") | {ROLES_OF_SHAREGPT: "keep"}).items():
        action, _, code = expect.partition(":")
        assert (action == "skip") == (line in bad), (line, expect, bad.get(line))
        assert code.split(" ")[0] in bad.get(line, ""), (line, expect, bad[line])


def test_the_other_messy_files(data_config: DataConfig) -> None:
    found = {name: read(data_config, MESSY / f"{name}.jsonl") for name in ("bom", "no_trailing_newline")}
    for name, items in found.items():
        assert len(items) == (MESSY / f"{name}.jsonl").read_bytes().strip().count(b"\n") + 1
        assert rejects(items) == []
    assert rejects(read(data_config, MESSY / "json_array.json")) == ["type"]
    assert read(data_config, MESSY / "empty.jsonl") == []
    cut = read(data_config, MESSY / "truncated.jsonl.gz")
    assert len(cut) > 100
    assert rejects(cut) == ["compression"]
    assert rejects(read(data_config, MESSY / "latin1_crlf.txt", "text")) == ["utf8"]
    nulls = rejects(read(data_config, MESSY / "nulls.parquet", "parquet"))
    assert {code: nulls.count(code) for code in nulls} == {"null": 29, "empty": 16}
    with pytest.raises(
        DataError, match=r"wrong_column\.parquet has no text column 'text'; its .* content: st"
    ):
        read(data_config, MESSY / "wrong_column.parquet", "parquet")
    with pytest.raises(DataError, match=r"corrupt\.parquet cannot be read as parquet"):
        read(data_config, MESSY / "corrupt.parquet", "parquet")


def test_the_whole_real_corpus_is_read(data_config: DataConfig) -> None:
    """Every row of every file is read, as many as SOURCES.md states."""
    counts = defaultdict(int)
    for file, rows in re.findall(r"^\| (corpus/\S+) \| (\d+) \|", (DATA / "SOURCES.md").read_text(), re.M):
        kind = "parquet" if file.endswith(".parquet") else "sft" if "/sft/" in file else "jsonl"
        items = read(data_config, DATA / file, kind)
        assert rejects(items) == []
        assert len({item.row.line for item in items}) == int(rows), file
        counts[kind] += 1
    assert dict(counts) == {"jsonl": 18, "parquet": 2, "sft": 3}
