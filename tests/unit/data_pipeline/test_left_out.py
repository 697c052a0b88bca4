"""What a preparation leaves out: near-duplicates and texts of benchmarks. Files that change meanwhile."""

import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline import overlap
from data_pipeline import prepare as preparation
from data_pipeline.config import DataConfig, DataError, SourceConfig
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import prepare
from data_pipeline.shards import TokenStream
from data_pipeline.tokenizer import load_tokenizer

VOCAB_SIZE, SEED = 512, 3
WORDS = [f"word{n}" for n in range(3000)]
QUESTION = "If a train leaves at nine and another one leaves at ten, where do the two of them meet?"


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def configured(base: DataConfig, folder: Path, path: str, kind: str = "jsonl", **settings) -> DataConfig:
    given = {"validation_fraction": 0.0, "slice_bytes": 20_000, "dir": str(folder), **settings}
    return replace(base, sources={"s": SourceConfig(kind, [path])}, **given)


def texts_of(config: DataConfig) -> list[str]:
    manifest = Manifest.load(Path(config.dir))
    stream = TokenStream(Path(config.dir), manifest.sources["s"].shards["train"])
    text = load_tokenizer(config.dir).decode(stream.read(0, len(stream)).tolist())
    return text.split("<|endoftext|>")[:-1]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_of_similar_documents_is_kept(data_config, tmp_path, workers):
    """Five versions of each of 30 texts, with three words in a thousand changed, shuffled over slices."""
    rng, rows = random.Random(0), []
    for number in range(30):
        words = rng.choices(WORDS, k=300)
        for _ in range(5):
            version = [word if rng.random() > 0.003 else rng.choice(WORDS) for word in words]
            rows.append({"number": number, "text": " ".join(version).capitalize() + rng.choice(".!?")})
    rng.shuffle(rows)
    path = jsonl(tmp_path / "a.jsonl", rows)
    config = configured(data_config, tmp_path / "made", path, deduplicate="minhash", num_workers=workers)
    manifest = prepare(config, VOCAB_SIZE, SEED)
    first = {row["number"]: row["text"] for row in reversed(rows)}
    kept = texts_of(config)
    assert set(first.values()) <= set(kept), "the first of each stays"
    assert len(kept) == len(first), "each pair is found with a probability above 0.999"
    assert manifest.sources["s"].skipped == {"duplicate": len(rows) - len(kept)}
    exact = configured(data_config, tmp_path / "exact", path, deduplicate="exact")
    equal = len(rows) - len({row["text"] for row in rows})
    assert prepare(exact, VOCAB_SIZE, SEED).sources["s"].skipped == {"duplicate": equal}
    assert equal < len(rows) - len(kept)


def test_conversations_and_prompts_that_share_much_are_kept(data_config, tmp_path):
    """Under minhash only equal ones are left out: a system prompt, an instruction, or the earlier turns of
    a row, with which each of its samples begins, do not make them duplicates."""
    long = " ".join(random.Random(1).choices(WORDS, k=400))

    def turns(*said: str) -> list[dict]:
        roles = ["user", "assistant"] * len(said)
        return [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]

    reasoned = turns("How?", long, "And how else?", "As well.", "And then?", "No way.")
    for answer in reasoned[1::2]:
        answer["reasoning_content"] = "hm"  # makes a sample of each answer
    short = [[{"role": "system", "content": long}, *turns(f"{n}?", f"{n}!")] for n in range(5)]
    for kind, samples, rows in (
        ("sft", 8, [{"messages": of} for of in (reasoned, *short)]),
        ("prompts", 5, [{"prompt": f"{long} {n} + {n}", "answer": str(2 * n)} for n in range(5)]),
    ):
        path = jsonl(tmp_path / f"{kind}.jsonl", [*rows, rows[-1]])
        config = configured(data_config, tmp_path / kind, path, kind, deduplicate="minhash")
        source = prepare(config, VOCAB_SIZE, SEED).sources["s"]
        assert source.skipped == {"duplicate": 1}
        assert sum(shard.documents for shard in source.shards["train"]) == samples


def test_without_the_package_the_remedy_is_told(data_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    overlap._empty_sketch.cache_clear()
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a b"}])
    config = configured(data_config, tmp_path / "made", path, deduplicate="minhash")
    with pytest.raises(DataError, match=r"needs the package datasketch; pip install -e '\.\[minhash\]'"):
        prepare(config, VOCAB_SIZE, SEED)


@pytest.mark.parametrize("on_bad_row", ["skip", "error"])
def test_texts_of_benchmarks_are_left_out_and_listed(data_config, tmp_path, on_bad_row):
    clean = [{"text": f"Trains of line {n} are never late, or nearly never."} for n in range(20)]
    dirty = {"text": f"An exercise. {QUESTION.upper()} Answer: nowhere."}
    path = jsonl(tmp_path / "a.jsonl", [*clean[:7], dirty, *clean[7:]])
    tests = jsonl(tmp_path / "test.jsonl", [{"id": 1, "ask": {"question": QUESTION, "choices": ["a", "b"]}}])
    (tmp_path / "more.txt").write_text("another " * 13)
    given = {"exclude": [tests, str(tmp_path / "*.txt")], "on_bad_row": on_bad_row, "max_bad_fraction": 0.0}
    config = configured(data_config, tmp_path / "made", path, **given)
    manifest = prepare(config, VOCAB_SIZE, SEED)
    assert manifest.sources["s"].skipped == {"contaminated": 1}
    assert texts_of(config) == [row["text"] for row in clean]
    [reject] = map(json.loads, (tmp_path / "made/rejects.jsonl").read_text().splitlines())
    shared = "if a train leaves at nine and another one leaves at ten where"
    assert (reject["line"], reject["reason"]) == (8, f"contaminated: data.exclude has '{shared}' too")
    jsonl(tmp_path / "test.jsonl", [{"question": "another"}])
    with pytest.raises(DataError, match=r"data\.exclude: prepared with 2 files"):
        prepare(config, VOCAB_SIZE, SEED)
    with pytest.raises(DataError, match=r"data\.exclude: .*none\.jsonl matches no file"):
        prepare(
            replace(config, exclude=[f"{tmp_path}/none.jsonl"], dir=str(tmp_path / "b")), VOCAB_SIZE, SEED
        )


def test_conversations_and_prompts_with_texts_of_benchmarks_are_left_out(data_config, tmp_path):
    tests = jsonl(tmp_path / "test.jsonl", [{"question": QUESTION}])
    asked = {"prompt": QUESTION, "answer": "nowhere"}
    chat = {"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": QUESTION}]}
    fine = [{"prompt": "Where?", "completion": "Here, where else.", "answer": "here"}] * 2
    for kind, row in (("prompts", asked), ("sft", chat)):
        path = jsonl(tmp_path / f"{kind}.jsonl", [row, *fine])
        config = configured(data_config, tmp_path / kind, path, kind, exclude=[tests], deduplicate="none")
        assert prepare(config, VOCAB_SIZE, SEED).sources["s"].skipped == {"contaminated": 1}


@pytest.mark.parametrize(
    ("name", "content", "longest"),
    [("short.jsonl", '{"question": "What is it?"}\n{"question": "Why?"}\n', 3), ("empty.txt", "", 0)],
)
def test_a_benchmark_that_excludes_nothing_stops(data_config, tmp_path, name, content, longest):
    tests = jsonl(tmp_path / "test.jsonl", [{"question": QUESTION}])
    (tmp_path / name).write_text(content)
    path = jsonl(tmp_path / "a.jsonl", [{"text": "something else"}])
    config = configured(data_config, tmp_path / "made", path, exclude=[tests, str(tmp_path / name)])
    law = f"data.exclude: .*/{name}: its longest text has {longest} words, and only texts of at least 13"
    with pytest.raises(DataError, match=law):
        prepare(config, VOCAB_SIZE, SEED)


@pytest.mark.parametrize("question", ["火车九点离开车站到达时间是几点", "จงหาคำตอบของโจทย์ต่อไปนี้"])
def test_texts_without_spaces_exclude(data_config, tmp_path, question):
    tests = jsonl(tmp_path / "test.jsonl", [{"question": question}])
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"前{question}后"}, {"text": "something else"}])
    config = configured(data_config, tmp_path / "made", path, exclude=[tests])
    assert prepare(config, VOCAB_SIZE, SEED).sources["s"].skipped == {"contaminated": 1}


def rewrite(path: Path, keep_time: bool) -> None:
    status, text = path.stat(), path.read_text()
    path.write_text(text.replace("number", "NUMBER"))
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("moment", "keep_time"),
    [("survey_slice", False), ("write_slice", False), ("_commit", False), ("write_slice", True)],
)
def test_a_file_that_is_edited_meanwhile_is_noticed(
    data_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, keep_time: bool
) -> None:
    """Also by its content alone, where an edit between the two readings leaves size and time as they were."""
    path = tmp_path / "a.jsonl"
    jsonl(path, [{"text": f"the number {n} of the file"} for n in range(900)])
    config, act = configured(data_config, tmp_path / "made", str(path)), getattr(preparation, moment)
    edits = iter([None])

    def edited_before(*given: object) -> object:
        if next(edits, "done") is None:
            rewrite(path, keep_time)
        return act(*given)

    monkeypatch.setattr(preparation, moment, edited_before)
    with pytest.raises(DataError, match=r"a\.jsonl changed while data was prepared from it; restore it"):
        prepare(config, VOCAB_SIZE, SEED)
    assert not (tmp_path / "made/manifest.json").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pretty.json", json.dumps([{"question": QUESTION}], indent=1).encode()),
        ("latin.jsonl", (json.dumps({"a": QUESTION}) + '\n{"b": "é"}\n').encode("latin-1")),
        ("plain.jsonl.gz", json.dumps({"question": QUESTION}).encode()),
        ("wide.txt", QUESTION.encode("utf-16")),
    ],
)
def test_a_benchmark_that_cannot_be_read_stops(data_config, tmp_path, name, content):
    """Its texts would be learned. The same folder can be prepared when the file is mended."""
    (tmp_path / name).write_bytes(content)
    path = jsonl(tmp_path / "a.jsonl", [{"text": QUESTION}, {"text": "something else"}])
    config = configured(data_config, tmp_path / "made", path, exclude=[str(tmp_path / name)])
    with pytest.raises(
        DataError, match=f"^data.exclude: .*{name}.* cannot be read .*; its texts would be learned"
    ):
        prepare(config, VOCAB_SIZE, SEED)
    mended = jsonl(tmp_path / "mended.jsonl", [{"question": QUESTION}])
    manifest = prepare(replace(config, exclude=[mended]), VOCAB_SIZE, SEED)
    assert manifest.sources["s"].skipped == {"contaminated": 1}


def test_too_many_bad_rows_are_refused_with_the_first(data_config, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": 1}, {"text": "fine"}])
    config = configured(data_config, tmp_path / "made", path, max_bad_fraction=0.1)
    first = f"rejects.jsonl lists the rows, first {path} line 1: type: the text is of type int"
    with pytest.raises(DataError, match=first):
        prepare(config, VOCAB_SIZE, SEED)
