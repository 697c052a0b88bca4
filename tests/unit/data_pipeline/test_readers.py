"""A bad row costs that row, and slices read every document once, wherever they are cut."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataError, SourceConfig
from data_pipeline.readers import Reject, list_inputs, plan_slices, read_slice


def read(kind: str, *paths: Path, slice_bytes: int = 10**9) -> tuple[list[str], list[Reject]]:
    source = SourceConfig(kind, [str(path) for path in paths], "text" if kind != "text" else None, 1.0, None)
    rejects: list[Reject] = []
    documents = [
        text
        for pieces in plan_slices(source, list_inputs("s", source, {}), slice_bytes)
        for text in read_slice(source, pieces, rejects.append)
    ]
    return documents, rejects


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


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("slice_bytes", [7, 100, 10**9])
def test_messy_jsonl(tmp_path: Path, suffix: str, slice_bytes: int) -> None:
    path = tmp_path / f"messy.{suffix}"
    content = b"\xef\xbb\xbf" + b"\n\n  \n".join(line for line, _ in MESSY)  # a BOM, blank lines, no last \n
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    documents, rejects = read("jsonl", path, slice_bytes=slice_bytes)
    assert documents == GOOD
    assert [reject.reason.split(":")[0] for reject in rejects] == [reason for _, reason in MESSY if reason]
    for reject, line in zip(rejects, [line for line, reason in MESSY if reason], strict=True):
        assert content[reject.offset :].startswith(line)
        json.dumps(reject)


def test_truncated_gzip_keeps_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.gz"
    rows = b"".join(
        b'{"text": "%d %s"}\n' % (i, bytes(97 + (i * i + j * j) % 26 for j in range(50))) for i in range(900)
    )
    path.write_bytes(gzip.compress(rows)[:-2000])
    documents, rejects = read("jsonl", path)
    assert 0 < len(documents) < 900
    assert documents[0].startswith("0 ")
    assert rejects[-1].reason.startswith("gzip: the rest of the file is lost")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=25),
    slice_bytes=st.integers(1, 120),
    final_newline=st.booleans(),
)
def test_slices_of_jsonl_read_every_line_once(
    tmp_path: Path, lengths: list[int], slice_bytes: int, final_newline: bool
) -> None:
    texts = [f"{i}" + "x" * length for i, length in enumerate(lengths)]
    content = "\n".join(json.dumps({"text": text}) for text in texts) + "\n" * final_newline
    halves = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    for path in halves:
        path.write_text(content)
    documents, rejects = read("jsonl", *halves, slice_bytes=slice_bytes)
    assert documents == texts + texts
    assert rejects == []


def test_text_files_and_globs(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfsecond\r\n")
    (tmp_path / "deep" / "er" / "a.txt").write_text("third")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "deep" / "bad.txt").write_bytes(b"good until \xff here")
    documents, rejects = read("text", tmp_path / "*.txt", tmp_path / "**" / "*.txt", slice_bytes=1)
    assert documents == ["first", "second\r\n", "third"]
    assert [(reject.offset, reject.reason) for reject in rejects] == [(11, "utf8")]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    texts = ["one", None, "", "two"]
    pq.write_table(pa.table({"n": [1, 2, 3, 4], "text": pa.array(texts, kind)}), tmp_path / "a.parquet")
    documents, rejects = read("parquet", tmp_path / "a.parquet", tmp_path / "*.parquet")
    assert documents == ["one", "two"]
    assert [(reject.offset, reject.reason) for reject in rejects] == [(1, "null"), (2, "empty")]


def test_parquet_without_the_column_lists_the_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["a"], "text": [1]}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match="no text column 'text'; its columns are content: string, text: int64"
    ):
        read("parquet", tmp_path / "a.parquet")


def test_damaged_parquet(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"text": [str(i) * 50 for i in range(5000)]}), tmp_path / "a.parquet", compression="gzip"
    )
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    (tmp_path / "cut.parquet").write_bytes(content[:-100])
    content[200:400] = bytes(200)
    (tmp_path / "flipped.parquet").write_bytes(content)
    for name in ("cut", "flipped"):
        with pytest.raises(DataError, match=rf"{name}\.parquet is no whole parquet file"):
            read("parquet", tmp_path / f"{name}.parquet")


def test_inputs_are_hashed_once(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    source = SourceConfig("text", [str(path)], None, 1.0, None)
    [first] = list_inputs("s", source, {})
    marked = first._replace(sha256="known")
    assert list_inputs("s", source, {str(path): marked}) == [marked]  # same size and age: not read again
    path.write_text("TEXT")
    [changed] = list_inputs("s", source, {str(path): marked})
    assert changed.sha256 not in (first.sha256, "known")


def test_missing_path() -> None:
    with pytest.raises(DataError, match=r"data\.sources\.s\.paths: /no/\*\.jsonl matches no file"):
        list_inputs("s", SourceConfig("jsonl", ["/no/*.jsonl"], "text", 1.0, None), {})
