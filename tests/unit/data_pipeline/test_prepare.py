"""Preparing is exact, restartable, the same for any number of workers, and never overwrites other files."""

import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import contents

from data_pipeline.config import DataConfig, DataError, SourceConfig
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import prepare
from data_pipeline.shards import TokenStream, verify
from data_pipeline.tokenizer import load_tokenizer

VOCAB_SIZE, SEED = 512, 7
SCRIPT = """
import pickle, sys
from data_pipeline.prepare import prepare
if __name__ == "__main__":
    prepare(pickle.loads(bytes.fromhex(sys.argv[1])), 512, 7)
"""


def documents_of(config: DataConfig, source: str, split: str) -> list[str]:
    """The documents of the shards, decoded, cut at the stored offsets."""
    folder, tokenizer = Path(config.dir), load_tokenizer(config.dir)
    found = []
    for shard in Manifest.load(folder).sources[source].shards[split]:
        tokens = np.fromfile(folder / "slices" / f"{shard.name}.tokens", dtype="<u4")
        offsets = np.fromfile(folder / "slices" / f"{shard.name}.offsets", dtype="<u8").astype(int)
        assert (len(offsets) - 1, offsets[0], offsets[-1]) == (shard.documents, 0, len(tokens))
        for start, stop in itertools.pairwise(offsets):
            assert tokens[stop - 1] == tokenizer.end_of_text
            assert tokenizer.end_of_text not in tokens[start : stop - 1]
            found.append(tokenizer.decode(tokens[start : stop - 1].tolist()))
    return found


def test_every_document_is_kept_once_in_order(prepared: DataConfig, corpus: Path) -> None:
    letters = [json.loads(line)["text"] for line in (corpus / "letters.jsonl").read_text().splitlines()]
    numbers = [path.read_text() for path in sorted((corpus / "numbers").glob("*.txt"))]
    for source, texts in (("letters", letters), ("numbers", numbers)):
        train, validation = (documents_of(prepared, source, split) for split in ("train", "validation"))
        held_out = set(validation)
        assert train == [text for text in texts if text not in held_out]
        assert validation == [text for text in texts if text in held_out]
        assert 0.02 < len(validation) / len(texts) < 0.25


def test_manifest_counts_and_entropy(prepared: DataConfig) -> None:
    manifest = verify(Path(prepared.dir))
    tokenizer = load_tokenizer(prepared.dir)
    assert manifest.tokenizer.end_of_text == tokenizer.end_of_text
    for name, source in manifest.sources.items():
        counts = {}
        for split, shards in source.shards.items():
            stream = TokenStream(Path(prepared.dir), shards)
            tokens = stream.read(0, len(stream))
            assert sum(shard.tokens for shard in shards) == len(tokens)
            ends = (tokens == tokenizer.end_of_text).sum()
            documents = len(documents_of(prepared, name, split))
            assert sum(shard.documents for shard in shards) == documents == ends
            assert all(shard.tokens * 4 <= prepared.shard_bytes or shard.documents == 1 for shard in shards)
            counts[split] = np.bincount(tokens, minlength=manifest.tokenizer.vocab_size)
        smooth = (counts["train"] + 1) / (counts["train"] + 1).sum()
        expected = -(counts["validation"] * np.log(smooth)).sum() / counts["validation"].sum()
        assert source.validation_unigram_cross_entropy == pytest.approx(expected, rel=1e-9)
    assert len(manifest.shards()) > 10  # the corpus must span many slices and shards


def test_workers_do_not_change_a_byte(data_config: DataConfig, tmp_path: Path) -> None:
    other = replace(data_config, dir=str(tmp_path / "other"), num_workers=3)
    prepare(data_config, VOCAB_SIZE, SEED)
    prepare(other, VOCAB_SIZE, SEED)
    assert contents(data_config.dir) == contents(other.dir)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _finished(config: DataConfig) -> dict[str, int]:
    """Inodes of the finished surveys and slices."""
    found = [*Path(config.dir).glob("survey/[!.]*-*"), *Path(config.dir).glob("slices/[!.]*")]
    return {str(path): path.stat().st_ino for path in found}


def _run_until_killed(config: DataConfig, goal: int, chance: random.Random) -> None:
    """Start preparing in a process; kill -9 it shortly after `goal` folders exist; its workers must die."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, pickle.dumps(config).hex()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while len(_finished(config)) < goal or not (Path(config.dir) / "plan.json").exists():
        assert process.poll() is None, "preparing finished before it could be killed"
        time.sleep(0.001)
    time.sleep(chance.random() * 0.02)
    workers = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "the workers outlived their parent"
        time.sleep(0.01)


def test_killed_preparation_goes_on_to_the_same_bytes(data_config: DataConfig, tmp_path: Path) -> None:
    """Killed ten times, at random moments of survey and encoding, with one worker and with two."""
    letters = (Path(data_config.sources["letters"].paths[0])).read_bytes().splitlines()
    again = jsonl_source(tmp_path / "again.jsonl", [*letters[:40], b"bad", *letters[:20]])
    config = replace(data_config, sources={**data_config.sources, "again": again}, slice_bytes=300)
    undisturbed = replace(config, dir=str(tmp_path / "undisturbed"))
    prepare(undisturbed, VOCAB_SIZE, SEED)
    total = len(list((Path(undisturbed.dir) / "slices").iterdir()))
    assert total > 200

    chance = random.Random(os.urandom(8))
    finished: dict[str, int] = {}
    for kill, goal in enumerate(sorted(chance.sample(range(int(1.8 * total)), 10))):
        _run_until_killed(replace(config, num_workers=1 + kill % 2), goal, chance)
        assert not (Path(config.dir) / "manifest.json").exists()
        now = _finished(config)
        assert finished.items() <= now.items()  # finished folders must not be made again
        finished = now
    prepare(config, VOCAB_SIZE, SEED)
    assert contents(config.dir) == contents(undisturbed.dir)
    inodes = {str(path): path.stat().st_ino for path in (Path(config.dir) / "slices").iterdir()}
    assert {path: inode for path, inode in finished.items() if "/slices/" in path}.items() <= inodes.items()


def test_leftovers_of_a_process_of_the_same_number(data_config: DataConfig) -> None:
    """In a container a new process may get the number of an earlier one."""
    prepare(data_config, VOCAB_SIZE, SEED)
    before, folder = contents(data_config.dir), Path(data_config.dir)
    (folder / "manifest.json").rename(folder / "plan.json")
    (folder / "slices" / "letters-00001").rename(folder / "slices" / f".letters-00001.{os.getpid()}")
    prepare(data_config, VOCAB_SIZE, SEED)
    assert contents(folder) == before


def test_what_is_half_removed_is_not_finished(
    data_config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that outlives its killed parent must not rename a folder while another process empties it."""
    prepare(data_config, VOCAB_SIZE, SEED)
    before, folder = contents(data_config.dir), Path(data_config.dir)
    (folder / "manifest.json").rename(folder / "plan.json")
    target, partial = (folder / "slices" / name for name in ("letters-00001", ".letters-00001.1"))
    target.rename(partial)
    remove = shutil.rmtree

    def remove_beside_a_worker(path: Path, *args: Any, **options: Any) -> None:
        for file in path.iterdir() if path.is_dir() and path.parent == target.parent else ():
            file.unlink()
        if partial.exists():  # here the worker finishes
            partial.rename(target)
        remove(path, *args, **options)

    monkeypatch.setattr("data_pipeline.prepare.shutil.rmtree", remove_beside_a_worker)
    prepare(data_config, VOCAB_SIZE, SEED)
    assert contents(folder) == before


def test_the_seed_chooses_what_is_held_out(data_config: DataConfig, prepared: DataConfig) -> None:
    prepare(data_config, VOCAB_SIZE, SEED + 1)
    one, two = (set(documents_of(config, "letters", "validation")) for config in (prepared, data_config))
    assert one
    assert two
    assert len(one & two) < min(len(one), len(two))


def test_a_prepared_folder_is_left_alone(
    data_config: DataConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first = prepare(data_config, VOCAB_SIZE, SEED)
    before = {path: path.stat().st_mtime_ns for path in Path(data_config.dir).rglob("*")}
    capsys.readouterr()
    relaxed = {name: replace(s, weight=9.0, max_epochs=2.0) for name, s in data_config.sources.items()}
    again = prepare(replace(data_config, num_workers=2, sources=relaxed), VOCAB_SIZE, SEED)
    assert again == first
    assert capsys.readouterr().out.startswith(f"already prepared: {data_config.dir}")
    assert {path: path.stat().st_mtime_ns for path in Path(data_config.dir).rglob("*")} == before


@pytest.mark.parametrize("unfinished", [False, True])
def test_another_configuration_is_refused(data_config: DataConfig, tmp_path: Path, unfinished: bool) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text " * 100)
    sources = {**data_config.sources, "more": SourceConfig("text", [str(text)], None, 1.0, None)}
    config = replace(data_config, sources=sources, validation_fraction=0.0)
    prepare(config, VOCAB_SIZE, SEED)
    if unfinished:
        (Path(config.dir) / "manifest.json").rename(Path(config.dir) / "plan.json")
    before = contents(config.dir)

    def refusal(changed: DataConfig, seed: int = SEED) -> str:
        with pytest.raises(
            DataError, match="was prepared with another configuration; name another folder"
        ) as error:
            prepare(changed, 1 << 20, seed)
        assert contents(config.dir) == before
        return str(error.value)

    message = refusal(replace(config, validation_fraction=0.2, tokenizer_vocab_size=600))
    assert "data.validation_fraction: prepared with 0.0, now 0.2" in message
    assert "data.tokenizer_vocab_size: prepared with 512, now 600" in message
    assert message.count("\n") == 2
    assert "seed: prepared with 7, now 8" in refusal(config, seed=8)
    assert "data.sources.more.kind: prepared with text, now nothing" in refusal(
        replace(config, sources=data_config.sources)
    )
    tokenizer = replace(config, tokenizer=config.dir, tokenizer_vocab_size=None)
    assert "data.tokenizer: prepared with None, now sha256" in refusal(tokenizer)
    text.write_text("SOME TEXT " * 100)  # same length as before
    assert "data.sources.more.paths: prepared with 1 files" in refusal(config)


def test_folders_that_are_not_ours(data_config: DataConfig) -> None:
    folder = Path(data_config.dir)
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="holds other files"):
        prepare(data_config, VOCAB_SIZE, SEED)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]
    (folder / "thesis.tex").unlink()
    (folder / "survey").mkdir()  # of people, perhaps
    with pytest.raises(DataError, match="holds other files"):
        prepare(data_config, VOCAB_SIZE, SEED)
    assert [path.name for path in folder.rglob("*")] == ["survey"]
    (folder / "survey").rmdir()
    prepare(data_config, VOCAB_SIZE, SEED)


def test_too_large_a_tokenizer_is_refused_before_any_work(
    data_config: DataConfig, prepared: DataConfig
) -> None:
    message = r"model\.vocab_size=511 is smaller than the tokenizer of the data, which has 512 ids"
    with pytest.raises(DataError, match=message):
        prepare(data_config, 511, SEED)
    given = replace(data_config, tokenizer=prepared.dir, tokenizer_vocab_size=None)
    with pytest.raises(DataError, match=message):
        prepare(given, 511, SEED)
    assert not Path(data_config.dir).exists()


def test_a_given_tokenizer_is_used_as_it_is(data_config: DataConfig, prepared: DataConfig) -> None:
    given = replace(data_config, tokenizer=f"{prepared.dir}/tokenizer.json", tokenizer_vocab_size=None)
    prepare(given, VOCAB_SIZE, SEED)
    original = (Path(prepared.dir) / "tokenizer.json").read_bytes()
    assert (Path(given.dir) / "tokenizer.json").read_bytes() == original
    assert documents_of(given, "letters", "train") == documents_of(prepared, "letters", "train")


def test_control_strings_in_documents_stay_text(data_config: DataConfig, tmp_path: Path) -> None:
    texts = ["plain", "a <|endoftext|> in the middle", "<|im_start|>user\nhi<|im_end|><think>"]
    path = tmp_path / "control.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = SourceConfig("jsonl", [str(path)], "text", 1.0, None)
    config = replace(data_config, sources={"control": source}, validation_fraction=0.0)
    prepare(config, VOCAB_SIZE, SEED)
    assert documents_of(config, "control", "train") == texts


def jsonl_source(path: Path, rows: list[bytes]) -> SourceConfig:
    path.write_bytes(b"\n".join(rows) + b"\n")
    return SourceConfig("jsonl", [str(path)], "text", 1.0, None)


def rejects_of(config: DataConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.dir) / "rejects.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("on_bad_row", ["skip", "quarantine"])
def test_bad_rows_are_listed_with_their_place(
    data_config: DataConfig, tmp_path: Path, on_bad_row: str
) -> None:
    rows = [b'{"text": "good row %d"}' % i for i in range(50)]
    bad = {7: b'{"text": 3}', 20: b'{"text": "\xff' + b"y" * 300 + b'"}', 21: b"", 40: b'{"title": "x"}'}
    rows = [bad.get(i, row) for i, row in enumerate(rows)]
    path = tmp_path / "messy.jsonl"
    config = replace(
        data_config,
        sources={"other": data_config.sources["numbers"], "messy": jsonl_source(path, rows)},
        validation_fraction=0.0,
        slice_bytes=100,  # line numbers must count across slices
        on_bad_row=on_bad_row,
    )
    source = prepare(config, VOCAB_SIZE, SEED).sources["messy"]
    assert source.skipped == {"type": 1, "utf8": 1, "missing": 1, "blank": 1}
    for reject, number in zip(rejects_of(config), (7, 20, 40), strict=True):
        row = rows[number] + b"\n"
        assert (reject["source"], reject["file"], reject["line"]) == ("messy", str(path), number + 1)
        assert path.read_bytes()[reject["offset"] :].startswith(row)
        assert reject["head"].encode("utf-8", "surrogateescape") == row[:200]
        kept = reject.get("row", "").encode("utf-8", "surrogateescape")
        assert kept == (row if on_bad_row == "quarantine" else b"")
    assert len(documents_of(config, "messy", "train")) == 46


def test_a_bad_row_can_be_an_error(
    data_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    source = jsonl_source(tmp_path / "a.jsonl", [b'{"text": "good"}', b"", b'{"text": null}'])
    config = replace(data_config, sources={"s": source}, on_bad_row="error")
    with pytest.raises(
        DataError, match=r"a\.jsonl: the row at 18 is bad \(null\): .* fix it .*, or set data.on"
    ):
        prepare(config, VOCAB_SIZE, SEED)
    # in the same folder: with skip, interrupted after the survey; with error; with skip to the end
    monkeypatch.setattr("data_pipeline.prepare.write_slice", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(replace(config, on_bad_row="skip"), VOCAB_SIZE, SEED)
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"s: 1 of 2 rows .* data\.on_bad_row=error allows none; fix the f"):
        prepare(config, VOCAB_SIZE, SEED)
    prepare(replace(config, on_bad_row="skip"), VOCAB_SIZE, SEED)


def test_a_broken_source_stops_before_anything_is_encoded(data_config: DataConfig, tmp_path: Path) -> None:
    rows = [b'{"text": "good"}', b'{"text": "better"}', b"{", b"", b'{"text": 1}']
    sources = {"s": jsonl_source(tmp_path / "a.jsonl", rows)}
    config = replace(data_config, sources=sources, max_bad_fraction=0.49, validation_fraction=0.0)
    with pytest.raises(
        DataError, match=r"s: 2 of 4 rows are bad \(1 blank, 1 json, 1 type\), more than data\.max"
    ):
        prepare(config, VOCAB_SIZE, SEED)
    assert [reject["line"] for reject in rejects_of(config)] == [3, 5]
    assert not (Path(config.dir) / "slices").exists()
    prepare(replace(config, max_bad_fraction=0.5), VOCAB_SIZE, SEED)

    nothing = jsonl_source(tmp_path / "b.jsonl", [b"{"])
    config = replace(config, dir=str(tmp_path / "b"), sources={"s": nothing}, max_bad_fraction=1.0)
    with pytest.raises(
        DataError, match=r"s: 1 of 1 rows are bad \(1 json\), the source has no document; fix the files or"
    ):
        prepare(config, VOCAB_SIZE, SEED)


def test_a_failed_preparation_says_how_to_go_on(data_config: DataConfig, tmp_path: Path) -> None:
    rows = [b'{"text": "good"}', b"{", b'{"text": "better"}']
    sources = {"s": jsonl_source(tmp_path / "a.jsonl", rows)}
    config = replace(data_config, sources=sources, on_bad_row="error", validation_fraction=0.0)
    with pytest.raises(
        DataError, match=r"fix it \(a preparation then needs a new data\.dir\), or set data\.on_bad_row=skip"
    ):
        prepare(config, VOCAB_SIZE, SEED)
    jsonl_source(tmp_path / "a.jsonl", [rows[0], rows[2]])
    with pytest.raises(DataError, match=r"name another folder as data\.dir, .* also after a correction"):
        prepare(config, VOCAB_SIZE, SEED)
    Path(config.dir).rename(tmp_path / "away")
    prepare(config, VOCAB_SIZE, SEED)
    assert documents_of(config, "s", "train") == ["good", "better"]
    jsonl_source(tmp_path / "a.jsonl", rows)
    begun = replace(config, dir=str(tmp_path / "begun"))
    with pytest.raises(DataError, match="is bad"):
        prepare(begun, VOCAB_SIZE, SEED)
    prepare(replace(begun, on_bad_row="skip"), VOCAB_SIZE, SEED)
    assert documents_of(begun, "s", "train") == ["good", "better"], "this setting may change"


@pytest.mark.parametrize("deduplicate", ["exact", "none"])
def test_the_first_of_equal_documents_is_kept(
    data_config: DataConfig, tmp_path: Path, deduplicate: str
) -> None:
    chance = random.Random(0)
    numbers = [chance.randint(0, 40) for _ in range(200)]
    rows = [b'{"id": %d, "text": "number %d"}' % (i, number) for i, number in enumerate(numbers)]
    texts = [f"number {number}" for number in numbers]
    sources = {
        "a": jsonl_source(tmp_path / "a.jsonl", rows),
        "b": jsonl_source(tmp_path / "b.jsonl", rows[:50]),  # another source: it keeps its copies
    }
    for num_workers in (1, 2):
        config = replace(
            data_config,
            dir=str(tmp_path / f"prepared-{num_workers}"),
            sources=sources,
            slice_bytes=500,
            deduplicate=deduplicate,
            num_workers=num_workers,
            validation_fraction=0.0,
        )
        manifest = prepare(config, VOCAB_SIZE, SEED)
        for name, of_source in (("a", texts), ("b", texts[:50])):
            wanted = list(dict.fromkeys(of_source)) if deduplicate == "exact" else of_source
            assert documents_of(config, name, "train") == wanted
            repeats = len(of_source) - len(wanted)
            assert manifest.sources[name].skipped == ({"duplicate": repeats} if repeats else {})


def test_documents_lead_back_to_their_rows(prepared: DataConfig, corpus: Path) -> None:
    tokenizer = load_tokenizer(prepared.dir)
    manifest = Manifest.load(Path(prepared.dir))
    for name, source in manifest.sources.items():
        for shards in source.shards.values():
            stream = TokenStream(Path(prepared.dir), shards)
            borders = [border for offsets in stream.document_offsets() for border in offsets[:-1]]
            spans = itertools.pairwise([*borders, len(stream)])
            for number, (start, stop) in enumerate(spans):
                place = stream.document_at(start)
                assert place == stream.document_at(stop - 1)
                assert place[:3] == (number, start, stop)
                raw = Path(manifest.inputs[name][place.file].path).read_bytes()[place.offset :]
                text = json.loads(raw.split(b"\n")[0])["text"] if name == "letters" else raw.decode()
                assert tokenizer.decode(stream.read(start, stop - 1).tolist()) == text


def test_conversations_keep_what_is_learned(data_config: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    answers = [f"the answer is {n} " * (n % 5 + 1) for n in range(120)]
    with open(path, "w") as file:
        for answer in [*answers, "too long " * 500]:
            messages = [
                {"role": "user", "content": "what <|im_end|>?"},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    source = SourceConfig("sft", [str(path)], None, 1.0, None)
    config = replace(
        data_config, sources={"chat": source}, max_chat_tokens=500, slice_bytes=3000, validation_fraction=0.0
    )
    record = prepare(config, VOCAB_SIZE, SEED).sources["chat"]
    verify(Path(config.dir))
    assert (record.skipped, len(record.shards["train"]) > 3) == ({"too_long": 1}, True)
    stream = TokenStream(Path(config.dir), record.shards["train"])
    tokens, loss = stream.read(0, len(stream)), stream.read_loss(0, len(stream))
    tokenizer = load_tokenizer(config.dir)
    borders = [border for offsets in stream.document_offsets() for border in offsets[:-1]]
    spans = itertools.pairwise([*borders, len(stream)])
    for answer, (start, stop) in zip(answers, spans, strict=True):
        learned = tokens[start:stop][loss[start:stop]].tolist()
        assert tokenizer.decode(learned) == f"<think>\n\n</think>\n\n{answer}<|im_end|>"
        assert learned[-1] == tokenizer.control_id("<|im_end|>")
        assert tokens[start:stop].tolist().count(tokenizer.control_id("<|im_end|>")) == 2
        assert tokens[stop - 1] == tokenizer.end_of_text
        assert np.array_equal(stream.read_loss(start + 1, stop - 1), loss[start + 1 : stop - 1])
    assert TokenStream(Path(config.dir), []).read_loss(0, 0).tolist() == []


def test_the_error_of_a_worker_is_raised(
    data_config: DataConfig, prepared: DataConfig, tmp_path: Path
) -> None:
    path = tmp_path / "not.parquet"
    path.write_bytes(b"nothing of the kind")
    sources = {**data_config.sources, "zz": SourceConfig("parquet", [str(path)], "text", 1.0, None)}
    config = replace(
        data_config, sources=sources, num_workers=2
    )  # with a given tokenizer, the workers are the first to read
    config = replace(config, tokenizer=prepared.dir, tokenizer_vocab_size=None)
    with pytest.raises(DataError, match="cannot be read as parquet"):
        prepare(config, VOCAB_SIZE, SEED)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_full_disk_is_named_and_the_next_attempt_goes_on(
    data_config: DataConfig, prepared: DataConfig, tmp_path: Path, num_workers: int
) -> None:
    """A limit on file sizes in place of a full disk: both make write() fail."""
    given = replace(data_config, tokenizer=prepared.dir, tokenizer_vocab_size=None, shard_bytes=1 << 20)
    config, other = replace(given, num_workers=num_workers), replace(given, dir=str(tmp_path / "other"))
    prepare(other, VOCAB_SIZE, SEED)
    sizes = sorted(path.stat().st_size for path in (Path(other.dir) / "slices").rglob("*.tokens"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-1] - 1, limits[1]))
    try:
        with pytest.raises(DataError, match=r"data\.dir=.*File too large; fix this and run again to go on"):
            prepare(config, VOCAB_SIZE, SEED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((Path(config.dir) / "survey").iterdir())
    assert not list((Path(config.dir) / "slices").glob(".*"))
    prepare(config, VOCAB_SIZE, SEED)
    assert contents(config.dir) == contents(other.dir)
