"""Preparing is exact, restartable, the same for any number of workers, and overwrites nobody's folder."""

import fcntl
import itertools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

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


def contents(folder: str | Path) -> dict[str, bytes]:
    root = Path(folder)
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


def documents_of(config: DataConfig, source: str, split: str) -> list[str]:
    """Decoded documents, from the shards, cut at the offsets that are kept beside the tokens."""
    folder, tokenizer = Path(config.dir), load_tokenizer(config.dir)
    found = []
    for shard in Manifest.load(folder).sources[source].splits[split].shards:
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


def test_manifest_counts_and_entropies(prepared: DataConfig) -> None:
    manifest = verify(Path(prepared.dir))
    tokenizer = load_tokenizer(prepared.dir)
    assert manifest.tokenizer.end_of_text == tokenizer.end_of_text
    largest = 0
    for name, source in manifest.sources.items():
        streams = {
            split: TokenStream(Path(prepared.dir), part.shards) for split, part in source.splits.items()
        }
        counts = {}
        for split, part in source.splits.items():
            tokens = streams[split].read(0, len(streams[split]))
            documents = documents_of(prepared, name, split)
            assert part.tokens == len(tokens)
            assert part.documents == len(documents) == (tokens == tokenizer.end_of_text).sum()
            assert part.bytes == sum(len(document.encode()) for document in documents)
            assert all(
                shard.tokens * 4 <= prepared.shard_bytes or shard.documents == 1 for shard in part.shards
            )
            counts[split] = np.bincount(tokens, minlength=manifest.tokenizer.vocab_size)
            largest = max(largest, int(tokens.max()))
        p = counts["train"] / counts["train"].sum()
        assert source.unigram_entropy == pytest.approx(-sum(x * np.log(x) for x in p if x), rel=1e-9)
        smooth = (counts["train"] + 1) / (counts["train"] + 1).sum()
        expected = -(counts["validation"] * np.log(smooth)).sum() / counts["validation"].sum()
        assert source.validation_unigram_cross_entropy == pytest.approx(expected, rel=1e-9)
    assert manifest.tokenizer.max_token_id == largest
    assert len(manifest.shards()) > 10  # the fixture is meant to span slices and shards


def test_workers_do_not_change_a_byte(data_config: DataConfig, tmp_path: Path) -> None:
    other = replace(data_config, dir=str(tmp_path / "other"), num_workers=3)
    prepare(data_config, VOCAB_SIZE, SEED)
    prepare(other, VOCAB_SIZE, SEED)
    assert contents(data_config.dir) == contents(other.dir)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _run_until_killed(config: DataConfig, finished_slices: int, chance: random.Random) -> None:
    """Start preparing in a process; kill -9 it after that many slices. Its workers die too."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, pickle.dumps(config).hex()], stdout=subprocess.DEVNULL
    )
    slices = Path(config.dir) / "slices"
    while len(list(slices.glob("[!.]*"))) < finished_slices or not (slices.parent / "plan.json").exists():
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.001)
    time.sleep(chance.random() * 0.02)
    workers = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.01)


def test_killed_preparation_goes_on_to_the_same_bytes(data_config: DataConfig, tmp_path: Path) -> None:
    config = replace(data_config, slice_bytes=500)
    undisturbed = replace(config, dir=str(tmp_path / "undisturbed"))
    prepare(undisturbed, VOCAB_SIZE, SEED)
    total = len(list((Path(undisturbed.dir) / "slices").iterdir()))
    assert total > 100

    chance = random.Random(os.urandom(8))
    finished: dict[str, int] = {}
    for kill, num_workers in enumerate((2, 1, 2)):
        goal = 0 if kill == 0 else len(finished) + chance.randint(1, total // 4)
        _run_until_killed(replace(config, num_workers=num_workers), goal, chance)
        assert not (Path(config.dir) / "manifest.json").exists()
        now = {path.name: path.stat().st_ino for path in (Path(config.dir) / "slices").glob("[!.]*")}
        assert finished.items() <= now.items()  # finished slices are not written again
        finished = now
    prepare(config, VOCAB_SIZE, SEED)
    assert contents(config.dir) == contents(undisturbed.dir)
    inodes = {path.name: path.stat().st_ino for path in (Path(config.dir) / "slices").iterdir()}
    assert finished.items() <= inodes.items()


def test_leftovers_of_a_process_of_the_same_number(data_config: DataConfig) -> None:
    """In a container process numbers repeat from start to start."""
    prepare(data_config, VOCAB_SIZE, SEED)
    before, folder = contents(data_config.dir), Path(data_config.dir)
    (folder / "manifest.json").rename(folder / "plan.json")
    (folder / "slices" / "letters-00001").rename(folder / "slices" / f".letters-00001.{os.getpid()}")
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
        with pytest.raises(DataError, match="holds another preparation") as error:
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
    text.write_text("SOME TEXT " * 100)  # as long as before
    assert "data.sources.more.paths: prepared from 1 files" in refusal(config)


def test_folders_that_are_not_ours_or_in_use(data_config: DataConfig) -> None:
    folder = Path(data_config.dir)
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="holds other files"):
        prepare(data_config, VOCAB_SIZE, SEED)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]
    (folder / "thesis.tex").unlink()
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    with pytest.raises(DataError, match="being prepared by another process"):
        prepare(data_config, VOCAB_SIZE, SEED)
    os.close(descriptor)
    prepare(data_config, VOCAB_SIZE, SEED)


def test_too_large_a_tokenizer_is_refused_before_any_work(
    data_config: DataConfig, prepared: DataConfig
) -> None:
    with pytest.raises(
        DataError, match=r"data\.tokenizer_vocab_size=512 is larger than model\.vocab_size=511"
    ):
        prepare(data_config, 511, SEED)
    given = replace(data_config, tokenizer=prepared.dir, tokenizer_vocab_size=None)
    with pytest.raises(DataError, match=r"data\.tokenizer=.* 512 ids, is larger than model\.vocab_size=100"):
        prepare(given, 100, SEED)
    assert not Path(data_config.dir).exists()
    with pytest.raises(DataError, match=r"model\.vocab_size=100 is smaller than the tokenizer.* 512 ids"):
        Manifest.load(Path(prepared.dir)).check_vocab_size(100)


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


def test_rejected_rows_are_kept_with_their_reason(data_config: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "messy.jsonl"
    path.write_text('{"text": "good enough"}\n{"text": 3}\n{"title": "x"}\n')
    config = replace(data_config, sources={"messy": SourceConfig("jsonl", [str(path)], "text", 1.0, None)})
    config = replace(config, validation_fraction=0.0)
    manifest = prepare(config, VOCAB_SIZE, SEED)
    assert manifest.sources["messy"].rejected == 2
    rejected = Path(config.dir) / "slices" / "messy-00000" / "rejects.jsonl"
    rejects = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert [(reject["path"], reject["offset"]) for reject in rejects] == [(str(path), 24), (str(path), 36)]

    hopeless = replace(config, dir=str(tmp_path / "hopeless"))
    hopeless.sources["messy"] = replace(config.sources["messy"], text_key="body")
    with pytest.raises(DataError, match=r"data\.sources\.messy: no training document, 3 rows were rejected"):
        prepare(hopeless, VOCAB_SIZE, SEED)
    assert not (tmp_path / "hopeless" / "manifest.json").exists()


def test_the_error_of_a_worker_is_raised(
    data_config: DataConfig, prepared: DataConfig, tmp_path: Path
) -> None:
    path = tmp_path / "not.parquet"
    path.write_bytes(b"nothing of the kind")
    sources = {**data_config.sources, "zz": SourceConfig("parquet", [str(path)], "text", 1.0, None)}
    config = replace(
        data_config, sources=sources, num_workers=2
    )  # with a given tokenizer, workers read first
    config = replace(config, tokenizer=prepared.dir, tokenizer_vocab_size=None)
    with pytest.raises(DataError, match="is no whole parquet file"):
        prepare(config, VOCAB_SIZE, SEED)
