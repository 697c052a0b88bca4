"""What a folder tells about its preparation: the phase, how far it is, how fast, and what is left."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline import prepare as module
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import prepare
from data_pipeline.progress import PreparationProgress, look

VOCAB_SIZE, SEED = 512, 7


def interrupted(config: DataConfig, monkeypatch: pytest.MonkeyPatch, act: str, number: int) -> Path:
    """Prepare until `act` is called for the `number`-th time; slices then appear one second after another."""
    real, left = getattr(module, act), [number]

    def until(job: object) -> int:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(job)

    monkeypatch.setattr(module, act, until)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, VOCAB_SIZE, SEED)
    monkeypatch.undo()
    folder = Path(config.dir)
    return appear_by_second(folder, "survey" if act == "survey_slice" else "slices")


def appear_by_second(folder: Path, results: str) -> Path:
    for second, path in enumerate(sorted((folder / results).glob("[!.]*-*"))):
        os.utime(path, (second, second))
    return folder


@pytest.fixture
def config(data_config: DataConfig, tmp_path: Path) -> DataConfig:
    """Letters with three bad rows of which the first slice holds one, a blank row, and a repeated one."""
    rows = Path(data_config.sources["letters"].paths[0]).read_bytes().splitlines(keepends=True)
    rows = [b"{bad\n", b"\n", *rows, rows[0], b"bad\n", b"bad\n"]
    (tmp_path / "letters.jsonl").write_bytes(b"".join(rows))
    sources = {"letters": SourceConfig("jsonl", [f"{tmp_path}/letters.jsonl"])}
    return replace(data_config, sources=sources)


def test_nothing_is_known_during_the_plan(tmp_path: Path) -> None:
    assert look(tmp_path) == PreparationProgress("plan", 0, None, None, None, None)


def test_during_the_survey(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = look(interrupted(config, monkeypatch, "survey_slice", 4))
    total = Path(config.sources["letters"].paths[0]).stat().st_size
    assert (progress.phase, progress.done, progress.slices) == ("survey", 3, -(-total // 10_000))
    assert progress.tokens_per_second is None
    assert progress.seconds_left == pytest.approx((total - 30_000) / 10_000), "10,000 bytes in each second"
    assert progress.rejects == 1


def test_during_the_encoding(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = interrupted(config, monkeypatch, "write_slice", 4)
    progress = look(folder)
    written = sorted((folder / "slices").glob("letters-*"))[1:]
    tokens = sum(path.stat().st_size // 4 for of in written for path in of.glob("*.tokens"))
    assert (progress.phase, progress.done, progress.rejects) == ("prepare", 3, 3)
    assert progress.tokens_per_second == tokens / 2, "of the second and the third, in two seconds"
    total = Path(config.sources["letters"].paths[0]).stat().st_size
    assert progress.seconds_left == pytest.approx((total - 30_000) / 10_000)


def test_of_the_first_slice_no_rate_is_known(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = look(interrupted(config, monkeypatch, "write_slice", 2))
    assert (progress.done, progress.tokens_per_second, progress.seconds_left) == (1, None, None)


def test_afterwards(config: DataConfig) -> None:
    prepare(config, VOCAB_SIZE, SEED)
    progress = look(appear_by_second(Path(config.dir), "slices"))
    slices = len(os.listdir(Path(config.dir) / "slices"))
    assert (progress.phase, progress.done, progress.slices, progress.rejects) == ("done", slices, slices, 3)
    first = f"{min(os.listdir(Path(config.dir) / 'slices'))}/"
    shards = Manifest.load(Path(config.dir)).shards()
    later = sum(shard.tokens for shard in shards if not shard.name.startswith(first))
    assert progress.tokens_per_second == later / (slices - 1)
    assert progress.seconds_left == 0


def test_texts_of_benchmarks_are_no_rejects(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Path(config.sources["letters"].paths[0]).read_text().splitlines()[-4]
    (Path(config.dir).parent / "test.jsonl").write_text(row)
    config = replace(config, exclude=[f"{Path(config.dir).parent}/test.jsonl"])
    prepare(config, VOCAB_SIZE, SEED)
    assert Manifest.load(Path(config.dir)).sources["letters"].skipped["contaminated"] == 1
    assert look(Path(config.dir)).rejects == 3
