"""A bad row loses only that row, and slices read every document once, wherever they are cut."""

import gzip
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataConfig, DataError, SourceConfig
from data_pipeline.documents import Document, Reject, check_columns, read_documents
from data_pipeline.inputs import list_inputs
from data_pipeline.readers import BLANK, file_rows, plan_slices, read_rows

Read = Callable[..., tuple[list[str], list[Reject]]]


def source_of(kind: str, *paths: Path | str) -> SourceConfig:
    has_column = kind in ("jsonl", "parquet", "arrow", "hub")
    return SourceConfig(kind, [str(path) for path in paths], "text" if has_column else None, 1.0, None)


@pytest.fixture
def read(data_config: DataConfig) -> Read:
    """`read(kind, *paths, slice_bytes=, **settings)`: texts and rejects of a source; blank lines left out."""

    def read_source(
        kind: str, *paths: Path | str, slice_bytes: int = 10**9, **settings: object
    ) -> tuple[list[str], list[Reject]]:
        source = source_of(kind, *paths)
        config = replace(data_config, sources={"s": source}, **settings)
        found = [
            item
            for parts in plan_slices(source, list_inputs("s", source, {}), slice_bytes)
            for part in parts
            for item in read_documents(config, "s", read_rows(source, part))
        ]
        documents = [item for item in found if isinstance(item, Document)]
        texts = [
            "".join([item.text, *(piece.text or "" for piece in item.pieces or ())]) for item in documents
        ]
        return texts, [item for item in found if isinstance(item, Reject) and item.reason != BLANK]

    return read_source


def compressed(content: bytes, suffix: str) -> bytes:
    if suffix == "jsonl.gz":
        return gzip.compress(content)
    return pa.compress(content, "zstd", asbytes=True) if suffix == "jsonl.zst" else content


MESSY = [
    (b'{"text": "first"}', None),
    (b'{"text": ""}', "empty"),
    (b'{"text": " \\n "}', "empty"),
    (b'{"text": null}', "null"),
    (b'{"title": "no text"}', "missing"),
    (b'{"text": 12}', "type"),
    (b'{"text": ["a"]}', "type"),
    (b"[1, 2]", "type"),
    (b'{"text": "cut', "json"),
    (b"{'text': 'python'}", "json"),
    (b'{"text": "latin \xe9"}', "utf8"),
    (b'{"text": "half \\ud83d"}', "utf8"),
    (b"\x00" * 20, "json"),
    (b'{"text": "two"}{"text": "three"}', "json"),
    ('{"text": "line\u2028separator"}'.encode(), None),
    (b'{"text": "nul \\u0000 inside"}\r', None),
    (b"[" * 100_000, "json"),
    (b'{"text": "last", "text2": 1}', None),
]
GOOD = ["first", "line\u2028separator", "nul \0 inside", "last"]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("slice_bytes", [7, 100, 10**9])
def test_messy_jsonl(tmp_path: Path, read: Read, suffix: str, slice_bytes: int) -> None:
    path = tmp_path / f"messy.{suffix}"
    content = b"\xef\xbb\xbf" + b"\n\n  \n".join(line for line, _ in MESSY)  # a BOM, blank lines, no last \n
    path.write_bytes(compressed(content, suffix))
    documents, rejects = read("jsonl", path, slice_bytes=slice_bytes)
    assert documents == GOOD
    assert [reject.code for reject in rejects] == [reason for _, reason in MESSY if reason]
    for reject, line in zip(rejects, [line for line, reason in MESSY if reason], strict=True):
        assert content[reject.row.offset :].startswith(line)
        assert reject.head(None).encode("utf-8", "surrogateescape").rstrip(b"\n") == line
        assert reject.head().encode("utf-8", "surrogateescape").rstrip(b"\n") == line[:200]
        if slice_bytes == 10**9 or suffix != "jsonl":
            assert content[: reject.row.offset].count(b"\n") == reject.row.line - 1


ROWS = b"".join(
    b'{"text": "%d %s"}\n' % (i, random.Random(i).randbytes(40).hex().encode()) for i in range(9000)
)


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
def test_what_is_whole_of_a_damaged_archive_is_kept(tmp_path: Path, read: Read, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(compressed(ROWS, suffix)[:-2000])
    documents, rejects = read("jsonl", path)
    assert 1000 < len(documents) < 9000
    assert documents == [json.loads(line)["text"] for line in ROWS.splitlines()[: len(documents)]]
    assert rejects[-1].reason.startswith("compression: the rest of the file is lost")
    assert rejects[-1].row.line == len(documents) + 1


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
def test_a_file_that_is_no_archive_is_not_one_bad_row(tmp_path: Path, read: Read, suffix: str) -> None:
    path = tmp_path / f"plain.{suffix}"
    path.write_bytes(ROWS)
    with pytest.raises(DataError, match=rf"plain\.{suffix} cannot be read as jsonl"):
        read("jsonl", path)


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
def test_archives_of_several_members(tmp_path: Path, read: Read, suffix: str) -> None:
    (tmp_path / f"two.{suffix}").write_bytes(compressed(ROWS, suffix) + compressed(ROWS, suffix))
    documents, rejects = read("jsonl", tmp_path / f"two.{suffix}")
    assert (len(documents), rejects) == (18000, [])


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=25),
    slice_bytes=st.integers(1, 120),
    final_newline=st.booleans(),
)
def test_slices_of_jsonl_read_every_line_once(
    tmp_path: Path, read: Read, lengths: list[int], slice_bytes: int, final_newline: bool
) -> None:
    texts = [f"{i}" + "x" * length for i, length in enumerate(lengths)]
    content = "\n".join(json.dumps({"text": text}) for text in texts) + "\n" * final_newline
    halves = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    for path in halves:
        path.write_text(content)
    documents, rejects = read("jsonl", *halves, slice_bytes=slice_bytes)
    assert documents == texts + texts
    assert rejects == []


def test_text_files_and_globs(tmp_path: Path, read: Read) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfsecond\r\n")
    (tmp_path / "deep" / "er" / "a.txt").write_text("third")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "deep" / "bad.txt").write_bytes(b"\xef\xbb\xbfgood until \xff here")
    documents, rejects = read("text", tmp_path / "*.txt", tmp_path / "**" / "*.txt", slice_bytes=1)
    assert documents == ["first", "second\r\n", "third"]
    assert [reject.reason for reject in rejects] == ["utf8: byte 14 of the file is not UTF-8"]


def test_source_trees(tmp_path: Path, read: Read) -> None:
    for path in ("b.py", "a/z.py", "a/.hidden.py", ".git/config", "c/Makefile"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(f"text of {path}")
    (tmp_path / "a" / "logo.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "a" / "link.py").symlink_to(tmp_path / "b.py")
    os.mkfifo(tmp_path / "a" / "pipe.py")
    documents, rejects = read("tree", tmp_path)
    assert documents == ["text of b.py", "text of a/z.py", "text of c/Makefile"]
    assert rejects == []
    with pytest.raises(DataError, match=r"data\.sources\.s\.paths: /no/folder is not a folder with text"):
        read("tree", "/no/folder")


def write_table(path: Path, table: pa.Table) -> None:
    """In the format of the suffix, two rows per group; .stream.arrow is the format of `datasets` caches."""
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
        return
    new = pa.ipc.new_stream if path.name.endswith(".stream.arrow") else pa.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("slice_bytes", [1, 10**9])
@pytest.mark.parametrize("suffix", ["parquet", "arrow", "stream.arrow"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_tables(tmp_path: Path, read: Read, suffix: str, kind: pa.DataType, slice_bytes: int) -> None:
    texts = ["one", None, "", "two", "three"]
    column = pa.array(texts).cast(kind)
    write_table(tmp_path / f"a.{suffix}", pa.table({"n": [1, 2, 3, 4, 5], "text": column}))
    documents, rejects = read(suffix.split(".")[-1], tmp_path / f"a.{suffix}", slice_bytes=slice_bytes)
    assert documents == ["one", "two", "three"]
    assert [(reject.row.offset, reject.reason) for reject in rejects] == [(1, "null"), (2, "empty")]
    assert rejects[0].head() == '{"text": null}'


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_text_of_a_table_that_is_not_utf8_costs_its_row(tmp_path: Path, read: Read, suffix: str) -> None:
    """pyarrow does not check the text that it writes."""
    bytes_of = pa.array([b"one", b"tw\xff", b"three"])
    column = pa.StringArray.from_buffers(3, *bytes_of.buffers()[1:])
    write_table(tmp_path / f"a.{suffix}", pa.table({"text": column}))
    documents, rejects = read(suffix, tmp_path / f"a.{suffix}")
    assert documents == ["one", "three"]
    [reject] = rejects
    assert (reject.row.line, reject.row.offset) == (2, 1)
    assert reject.reason == "utf8: byte 2 of the text is not UTF-8"
    assert reject.head().encode("utf-8", "surrogateescape") == b"tw\xff"


def test_conversations_that_cannot_be_encoded(tmp_path: Path, read: Read) -> None:
    question, answer = {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}
    half = [
        {"messages": [{**question, "content": "\ud83d"}, answer]},
        {"messages": [question, {**answer, "content": "\ud83d"}]},
        {"messages": [question, {**answer, "tool_calls": [{"name": "\ud83d", "arguments": {}}]}]},
        {"messages": [question, answer], "tools": [{"name": "\ud83d"}]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"messages": [question, answer]}, *half]))
    documents, rejects = read("sft", path)
    assert len(documents) == 1
    assert [reject.reason for reject in rejects] == ["utf8: a lone surrogate"] * 4


@pytest.mark.parametrize("name", ["A.JSONL", "A.Parquet", "A.ARROW", "A.JSONL.GZ", "A.JSON.ZST"])
def test_names_in_capitals(tmp_path: Path, read: Read, name: str) -> None:
    row = {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}
    if name in ("A.Parquet", "A.ARROW"):
        write_table(tmp_path / name.lower(), pa.Table.from_pylist([row]))
        (tmp_path / name.lower()).rename(tmp_path / name)
    else:
        suffix = name.lower().replace("json.", "jsonl.").removeprefix("a.")
        (tmp_path / name).write_bytes(compressed(json.dumps(row).encode(), suffix))
    documents, rejects = read("sft", tmp_path / name)
    assert (len(documents), rejects) == (1, [])
    assert len(list(file_rows(f"{tmp_path}/{name}"))) == 1


def test_dates_in_conversations_of_a_table(tmp_path: Path, read: Read) -> None:
    """A date is an error only where the template would print it."""
    now = datetime(2020, 1, 1)
    question, answer = {"role": "user", "content": "2+2", "at": now}, {"role": "assistant", "content": "4"}
    rows = [
        {"messages": [question, answer], "tools": tools} for tools in (None, [{"name": "x", "since": now}])
    ]
    write_table(tmp_path / "a.parquet", pa.Table.from_pylist(rows))
    for share in (None, 0.5):
        documents, rejects = read("sft", tmp_path / "a.parquet", think_flag_share=share)
        assert len(documents) == 1
        assert [reject.reason for reject in rejects] == [
            "json: Object of type datetime is not JSON serializable"
        ]


def test_a_date_that_python_does_not_know_costs_its_row(tmp_path: Path, read: Read) -> None:
    messages = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
    dates = pa.array([0, 2**60, 1], pa.timestamp("us"))
    write_table(tmp_path / "a.parquet", pa.table({"messages": [messages] * 3, "at": dates}))
    documents, rejects = read("sft", tmp_path / "a.parquet")
    assert len(documents) == 2
    assert [(reject.row.offset, reject.reason) for reject in rejects] == [
        (1, "type: date value out of range")
    ]


def test_hub_datasets_are_read_from_the_cache(
    tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder takes the place of a hub dataset: `datasets` loads both in the same way."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    Dataset.from_dict({"text": ["one", "two"]}).to_parquet(tmp_path / "set" / "train.parquet")
    assert read("hub", f"{tmp_path}/set:train") == (["one", "two"], [])
    law = r"paths: .*/set:nosplit cannot be loaded by datasets\.load_dataset .*; check name, config, split"
    with pytest.raises(DataError, match=law):
        read("hub", f"{tmp_path}/set:nosplit")
    with pytest.raises(DataError, match=r"/set names no split; write NAME.*, as in .*/set:train"):
        read("hub", f"{tmp_path}/set")


def test_a_hub_name_without_a_network_says_what_to_do(
    read: Read, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataError) as error:
        read("hub", "nobody/has-this@main:english:train")
    assert "data.sources.s.paths: nobody/has-this@main:english:train cannot be loaded" in str(error.value)
    assert "Without a network: copy the files of the dataset here" in str(error.value)


def test_what_save_to_disk_wrote(tmp_path: Path, read: Read) -> None:
    """kind=arrow reads its files; an error says so if the folder is named as a hub dataset."""
    Dataset.from_dict({"text": ["one", "two", "three"]}).save_to_disk(tmp_path / "saved", num_shards=2)
    assert read("arrow", tmp_path / "saved" / "*.arrow") == (["one", "two", "three"], [])
    with pytest.raises(DataError, match=r"arrow for what datasets\.save_to_disk wrote \(paths=\[FOLDER/"):
        read("hub", f"{tmp_path}/saved:train")


def test_conversations_in_every_format(tmp_path: Path, read: Read) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": str(n)}]}
        for n in range(3)
    ]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"messages": rows[0]["messages"][:1]}])
    )
    for suffix in ("parquet", "arrow"):
        write_table(tmp_path / f"a.{suffix}", pa.Table.from_pylist(rows))
    documents, rejects = read("sft", tmp_path / "a.jsonl", tmp_path / "a.parquet", tmp_path / "a.arrow")
    assert len(documents) == 9
    assert documents[:3] == documents[3:6] == documents[6:]
    assert [reject.code for reject in rejects] == ["no_target"]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_without_the_column_lists_its_columns(tmp_path: Path, read: Read, suffix: str) -> None:
    write_table(tmp_path / f"a.{suffix}", pa.table({"content": ["a"], "text": [1]}))
    columns = "its columns are content: string, text: int64"
    with pytest.raises(DataError, match=f"no text column 'text'; {columns}"):
        read(suffix, tmp_path / f"a.{suffix}")
    with pytest.raises(DataError, match=f"no form of conversations fits; .*; {columns}"):
        read("sft", tmp_path / f"a.{suffix}")


def test_jsonl_without_the_column_lists_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "body": "a"}\nnot json\n{"id": 2, "text": null}\n')

    def check(kind: str) -> None:
        source = source_of(kind, path)
        [[part]] = plan_slices(source, list_inputs("s", source, {}), 10**9)
        check_columns("s", source, read_rows(source, part))

    columns = "their columns are id: int, body: str, text: NoneType"
    remedy = "set data.sources.s.text_key to one of them"
    with pytest.raises(
        DataError, match=f"data.sources.s: its first rows have no 'text' of type str; {columns}; {remedy}"
    ):
        check("jsonl")
    forms = "messages: 'messages'; sharegpt: 'conversations'; alpaca: 'instruction' with 'output'; "
    forms += "prompt_completion: 'prompt' with 'completion' or 'chosen'"
    law = rf"data.sources.s: no form .* looked for columns of text or lists \({forms}\); its {columns[6:]}"
    with pytest.raises(DataError, match=law):
        check("sft")
    path.write_text(path.read_text() + '{"text": "one good row is enough"}\n')
    check("jsonl")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_damaged_tables(tmp_path: Path, read: Read, suffix: str) -> None:
    table = pa.table({"text": [str(i) * 50 for i in range(5000)]})
    write_table(tmp_path / f"a.{suffix}", table)
    content = bytearray((tmp_path / f"a.{suffix}").read_bytes())
    (tmp_path / f"cut.{suffix}").write_bytes(content[:-100])
    with pytest.raises(DataError, match=rf"cut\.{suffix} cannot be read as {suffix}"):
        read(suffix, tmp_path / f"cut.{suffix}")
    if suffix == "parquet":
        pq.write_table(table, tmp_path / "flipped.parquet", compression="gzip")
        content = bytearray((tmp_path / "flipped.parquet").read_bytes())
        content[200:400] = bytes(200)
        (tmp_path / "flipped.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"flipped\.parquet cannot be read as parquet"):
            read("parquet", tmp_path / "flipped.parquet")


def test_short_documents_are_bad_rows(tmp_path: Path, read: Read) -> None:
    (tmp_path / "a.txt").write_text("long enough")
    (tmp_path / "b.txt").write_text("short")
    documents, rejects = read("text", tmp_path / "*.txt", min_characters=6)
    assert documents == ["long enough"]
    assert [reject.reason for reject in rejects] == ["too_short: 5 characters"]


def test_inputs_are_hashed_once(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    source = source_of("text", path)
    [first] = list_inputs("s", source, {})
    marked = replace(first, sha256="known")
    assert list_inputs("s", source, {str(path): marked}) == [marked]  # same size and time: not read again
    path.write_text("TEXT")
    [changed] = list_inputs("s", source, {str(path): marked})
    assert changed.sha256 not in (first.sha256, "known")


def test_missing_path() -> None:
    with pytest.raises(DataError, match=r"data\.sources\.s\.paths: /no/\*\.jsonl matches no file"):
        list_inputs("s", source_of("jsonl", "/no/*.jsonl"), {})
