"""How damage to a checkpoint is found, and from which checkpoint a run continues."""

import json
import os
import zlib
from contextlib import suppress
from pathlib import Path

import pytest

from trainer.checkpoints.folder import BLOCK_BYTES, damage, is_read, measure, reading
from trainer.settings.run_folder import (
    checkpoints,
    latest_checkpoint,
    read_manifest,
    read_state,
    write_manifest,
    write_state,
)


def make(run_dir: Path, step: int) -> Path:
    folder = run_dir / f"checkpoints/step-{step:08d}"
    (folder / "hf").mkdir(parents=True)
    (folder / "a").write_bytes(b"some bytes" * 1000)
    (folder / "hf/b").write_bytes(b"others")
    files = {name: measure(folder / name) for name in ("a", "hf/b")}
    write_manifest(folder, {"step": step, "files": files})
    return folder


def test_every_single_flipped_bit_of_a_manifest_is_noticed(tmp_path):
    folder = make(tmp_path, 1)
    assert damage(folder) == []
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for position in range(8 * len(whole)):
        data = bytearray(whole)
        data[position // 8] ^= 1 << position % 8
        path.write_bytes(data)
        with suppress(ValueError):
            assert read_manifest(folder)["files"] == json.loads(whole)["files"], "only white space may differ"
    path.write_bytes(whole.replace(b'"step": 1', b'"step": 2'))
    with pytest.raises(ValueError, match=r"manifest.json cannot be read \(its checksum differs\)"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: os.truncate(path, 5), "hf/b has 5 bytes instead of 6"),
        (lambda path: path.write_bytes(b"otherz"), "hf/b is not what was written: its checksum differs"),
        (lambda path: path.unlink(), "hf/b cannot be read (No such file or directory)"),
    ],
)
def test_damage_is_named_once_whoever_shares_the_work(tmp_path, harm, message):
    folder = make(tmp_path, 1)
    harm(folder / "hf/b")
    assert damage(folder) == [message]
    assert sorted(line for part in range(3) for line in damage(folder, part, 3)) == [message]


def test_the_one_that_latest_names_comes_first_then_newest(tmp_path):
    for step in (10, 9, 11):
        make(tmp_path, step)
    (tmp_path / "checkpoints/.step-00000012.attempt-1").mkdir()
    (tmp_path / "checkpoints/step-00000012-of-mine").mkdir()
    assert [path.name[-2:] for path in checkpoints(tmp_path)] == ["11", "10", "09"]
    (tmp_path / "latest").write_text("step-00000010\n")
    assert [path.name[-2:] for path in checkpoints(tmp_path)] == ["10", "11", "09"]
    (tmp_path / "checkpoints/step-00000010/manifest.json").unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints/step-00000011"
    (tmp_path / "latest").write_text("step-00000099\n")
    assert [path.name[-2:] for path in checkpoints(tmp_path)] == ["11", "10", "09"]
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_a_reader_is_noticed_while_it_reads(tmp_path):
    folder = make(tmp_path, 1)
    assert not is_read(folder)
    with reading(folder / "hf"), reading(folder):
        assert is_read(folder)
    assert not is_read(folder)


def test_an_attempt_that_was_overtaken_leaves_the_state_alone(tmp_path):
    write_state(tmp_path, "running", 2)
    write_state(tmp_path, "failed", 1)
    assert read_state(tmp_path) == {"state": "running", "attempt": 2}
    write_state(tmp_path, "finished", 2)
    assert read_state(tmp_path) == {"state": "finished", "attempt": 2}


def test_one_of_two_readers_goes_and_the_other_is_still_noticed(tmp_path):
    folder = make(tmp_path, 1)
    first, second = reading(folder / "hf"), reading(folder)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert is_read(folder)
    second.__exit__(None, None, None)
    assert not is_read(folder)


def test_who_reads_the_weights_alone_reads_the_checkpoint(tmp_path):
    folder = make(tmp_path, 1)
    with reading(folder / "hf"):
        assert is_read(folder)


def test_a_checksum_is_that_of_all_blocks(tmp_path):
    data = bytes(range(256)) * (BLOCK_BYTES // 256) + b"the rest"
    (tmp_path / "file").write_bytes(data)
    assert measure(tmp_path / "file") == [len(data), zlib.crc32(data)]
