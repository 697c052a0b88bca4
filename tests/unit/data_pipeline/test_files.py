"""Sources at addresses: listed, read in parts, prepared like files of this machine; every error is told."""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import fsspec
import pytest

from data_pipeline.config import DataConfig, DataError, SourceConfig
from data_pipeline.files import find, open_file, version
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import prepare
from data_pipeline.readers import kind_of

ROWS = [{"text": f"Text number {n} speaks of {n * n} and of ü and 🙂." * (1 + n % 7)} for n in range(400)]
VOCAB_SIZE, SEED = 512, 3
FORMATS = [("jsonl", "a.jsonl"), ("jsonl", "a.jsonl.gz"), ("parquet", "a.parquet"), ("text", "a.txt")]
FORMATS += [("arrow", "saved/data-00000-of-00001.arrow")]


class Ranged(SimpleHTTPRequestHandler):
    """A server of files that sends the parts that are asked for, as object stores do."""

    seen: list[str]

    def do_GET(self) -> None:
        asked, path = self.headers.get("Range"), Path(self.translate_path(self.path))
        self.seen.append(f"{path.name} {asked}")
        if asked is None or not path.is_file():
            return super().do_GET()
        first, last = map(int, re.findall(r"\d+", asked))
        data = path.read_bytes()
        part = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)
        return None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The same rows in every format."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(folder / "a.parquet", batch_size=50)
    table.save_to_disk(folder / "saved")
    (folder / "a.txt").write_text(ROWS[0]["text"])
    return folder


@pytest.fixture
def server(corpus: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a server of the corpus, and what is asked of it."""
    Ranged.seen = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranged, directory=str(corpus))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", Ranged.seen
        http.shutdown()


@pytest.fixture
def memory(corpus: Path) -> Iterator[str]:
    """The corpus in the memory of this process, as fsspec keeps it."""
    system = fsspec.filesystem("memory")
    system.put(f"{corpus}/", "/corpus/", recursive=True)
    yield "memory://corpus"
    system.rm("/corpus", recursive=True)


def prepared(config: DataConfig, folder: Path, kind: str, *paths: str) -> Manifest:
    sources = {"mine": SourceConfig(kind, list(paths))}
    settings = {"dir": str(folder), "sources": sources, "slice_bytes": 5_000, "tokenizer_vocab_size": 512}
    return prepare(replace(config, **settings), VOCAB_SIZE, SEED)


def content(folder: Path) -> dict[str, bytes]:
    """Everything that a preparation wrote, but the names of the inputs."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in files.items() if name.name != "manifest.json"}


@pytest.mark.parametrize(
    ("kind", "name"),
    FORMATS,
)
def test_what_is_prepared_is_the_same(corpus, server, memory, data_config, tmp_path, kind, name):
    address, seen = server
    places = {"here": f"{corpus}/{name}", "memory": f"{memory}/{name}", "http": f"{address}/{name}"}
    made = {}
    for place, path in places.items():
        manifest = prepared(data_config, tmp_path / place, kind, path)
        made[place] = content(tmp_path / place)
        [file] = manifest.inputs["mine"]
        assert (file.path, file.bytes) == (path, (corpus / name).stat().st_size)
    assert made["memory"] == made["http"] == made["here"]
    if name == "a.jsonl":
        assert len([key for key in made["http"] if key.endswith("slice.json")]) > 5
    assert not [asked for asked in seen if asked.endswith("None") and not asked.startswith("a.txt")]


@pytest.mark.parametrize(("kind", "name"), FORMATS[1:3])
def test_what_is_asked_of_a_server_is_no_part_of_a_name(corpus, server, data_config, tmp_path, kind, name):
    address = f"{server[0]}/{name}?download=true#a.txt"
    assert kind_of(address) == kind
    prepared(data_config, tmp_path / "here", kind, f"{corpus}/{name}")
    prepared(data_config, tmp_path / "http", kind, address)
    assert content(tmp_path / "http") == content(tmp_path / "here")


def test_globs_find_files_at_addresses(memory, corpus):
    assert find(f"{memory}/a.*") == sorted(f"memory:///corpus/{path.name}" for path in corpus.glob("a.*"))
    assert find(f"{memory}/nothing*") == []
    files = {f"memory:///corpus/{path.name}" for path in corpus.iterdir() if path.is_file()}
    assert set(find(f"{memory}/*")) == files, "without the folder"
    (corpus / "b[1].jsonl").write_bytes(b"{}\n")
    assert find(f"{corpus}/b[1].jsonl") == [f"{corpus}/b[1].jsonl"]


def test_a_file_that_changed_since_the_plan_is_named(memory, data_config, tmp_path):
    prepared(data_config, tmp_path / "made", "jsonl", f"{memory}/a.jsonl")
    assert "already" not in str(prepared(data_config, tmp_path / "made", "jsonl", f"{memory}/a.jsonl"))
    before = version(f"{memory}/a.jsonl")
    text = fsspec.filesystem("memory").cat("/corpus/a.jsonl")
    fsspec.filesystem("memory").pipe("/corpus/a.jsonl", text.replace(b"speaks", b"spoken"))
    after = version(f"{memory}/a.jsonl")
    assert after[0] == before[0]
    assert after[1] != before[1]
    with pytest.raises(DataError, match=r"data\.sources\.mine\.paths: prepared with"):
        prepared(data_config, tmp_path / "made", "jsonl", f"{memory}/a.jsonl")


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("jsonl", "nosuch://bucket/a.jsonl", "nosuch://bucket/a.jsonl cannot be read"),
        ("jsonl", "s3://bucket/a.jsonl", "install the package"),
        ("jsonl", "http://127.0.0.1:9/a.jsonl", "http://127.0.0.1:9/a.jsonl"),
        ("jsonl", "memory://corpus/nothing.jsonl", "matches no file"),
        ("tree", "memory://corpus", "kind=tree reads folders of this machine"),
    ],
)
def test_what_cannot_be_read_is_told(memory, data_config, tmp_path, kind, path, message):
    with pytest.raises(DataError, match=re.escape(message)):
        prepared(data_config, tmp_path / "made", kind, path)


@pytest.mark.parametrize(("kind", "name"), FORMATS[:3])
def test_a_broken_connection_is_never_the_end_of_a_file(
    server, data_config, tmp_path, monkeypatch, kind, name
):
    address, _ = server

    def cut(self: Ranged) -> None:
        self.send_response(206)
        self.send_header("Content-Range", "bytes 0-999999/999999")
        self.send_header("Content-Length", "999999")
        self.end_headers()
        self.wfile.write(b"x" * 10)
        self.close_connection = True

    monkeypatch.setattr(Ranged, "do_GET", cut)
    with pytest.raises(DataError, match="cannot be read") as told:
        prepared(data_config, tmp_path / "made", kind, f"{address}/{name}")
    assert address in str(told.value)
    assert not (tmp_path / "made/manifest.json").exists()


def test_a_server_that_cannot_be_reached_is_told(data_config, tmp_path):
    with pytest.raises(DataError, match=r"cannot be read .*Cannot connect.*check the address"):
        prepared(data_config, tmp_path / "made", "jsonl", "http://127.0.0.1:1/a.jsonl")


def test_a_file_is_read_from_any_place(memory, corpus):
    whole = (corpus / "a.jsonl").read_bytes()
    with open_file(f"{memory}/a.jsonl") as file:
        for start, size in ((0, 10), (5000, 300), (17, 9000), (len(whole) - 3, 9)):
            file.seek(start)
            assert file.read(size) == whole[start : start + size]
            assert file.tell() == min(start + size, len(whole))
