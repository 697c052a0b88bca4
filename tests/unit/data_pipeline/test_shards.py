"""Damage is reported with file, place, law and remedy; a stream reads across the borders of shards."""

import json
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline import shards
from data_pipeline.config import DataConfig, DataError
from data_pipeline.manifest import Manifest
from data_pipeline.packing import make_plans
from data_pipeline.shards import ShardWriter, TokenStream, open_prepared, verify


@pytest.fixture
def folder(prepared: DataConfig, tmp_path: Path) -> Path:
    """A copy of the prepared folder, which tests may damage."""
    return Path(shutil.copytree(prepared.dir, tmp_path / "copy"))


def largest_shard(folder: Path) -> Path:
    return max((folder / "slices").rglob("*.tokens"), key=lambda path: path.stat().st_size)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=30), capacity=st.integers(1, 60), data=st.data()
)
def test_stream_reads_any_span(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], capacity: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "slices" / "s").mkdir(parents=True)
    writer = ShardWriter(folder / "slices" / "s", "s", "train", capacity * 4)
    tokens = np.arange(sum(lengths), dtype=np.uint32) * 70_001
    for document in np.split(tokens, np.cumsum(lengths)[:-1]):
        writer.add(document, (0, 0))
    stream = TokenStream(folder, writer.close())
    assert len(stream) == len(tokens)
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(start, len(tokens)))
    assert np.array_equal(stream.read(start, stop), tokens[start:stop])
    stream.close()


def test_more_shards_than_open_files(prepared: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Manifest.load(Path(prepared.dir)).sources["letters"].shards["train"]
    whole = TokenStream(Path(prepared.dir), record)
    tokens = whole.read(0, len(whole))
    monkeypatch.setattr(shards, "_OPEN_FILES", 2)
    few = TokenStream(Path(prepared.dir), record)
    for start in np.random.default_rng(0).integers(0, len(tokens) - 100, 50).tolist():
        assert np.array_equal(few.read(start, start + 100), tokens[start : start + 100])
    assert len(few._open) == 2
    few.read(0, len(few))
    assert [shard for shard, _ in few._open] == [len(record) - 2, len(record) - 1], "the last used stay open"
    few.close()
    whole.close()


def test_a_whole_folder_passes(prepared: DataConfig) -> None:
    assert (
        verify(Path(prepared.dir)) == open_prepared(Path(prepared.dir)) == Manifest.load(Path(prepared.dir))
    )


@pytest.mark.parametrize("change", [-4, 4])
def test_a_shard_of_another_size(folder: Path, change: int) -> None:
    path = largest_shard(folder)
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    message = rf"{path} has {len(content) + change} bytes, its manifest says {len(content)}; move the folder"
    for check in (open_prepared, verify):
        with pytest.raises(DataError, match=message):
            check(folder)


def test_a_missing_shard_among_too_many_to_look_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SIZES_CHECKED", 0)
    monkeypatch.setattr(shards, "_BLOCKS_CHECKED", 1000)
    path = largest_shard(folder)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path} cannot be read \(No such file or directory\)"):
        open_prepared(folder)


def test_a_shard_cut_off_after_the_start(folder: Path) -> None:
    record = Manifest.load(folder).sources["letters"].shards["train"]
    stream = TokenStream(folder, record)
    stream.read(0, 10)  # the file is open now
    path = folder / "slices" / f"{record[0].name}.tokens"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=rf"{path} ends at byte 100, 200 are needed; "):
        stream.read(0, 50)
    with pytest.raises(DataError, match=r"has 100 bytes"):
        TokenStream(folder, record).read(0, 10)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path} cannot be read \(No such file"):
        TokenStream(folder, record).read(0, 10)


def test_flipped_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = largest_shard(folder)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    message = rf"{path} is damaged between bytes 0 and {len(content)}: crc32 "
    with pytest.raises(DataError, match=message):
        verify(folder)
    monkeypatch.setattr(shards, "_BLOCKS_CHECKED", 1000)  # a real start checks a sample; here, every block
    with pytest.raises(DataError, match=message):
        open_prepared(folder)


def test_blocks_are_checked_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_BLOCK_BYTES", 64)
    folder = tmp_path / "slices" / "s"
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, "s", "train", 1 << 20)
    for length in (5, 40, 1, 30):
        writer.add(np.arange(length, dtype=np.uint32), (0, 0))
    [record] = writer.close()
    assert len(record.crc32["tokens"]) == 8 * 5  # 76 tokens of 4 bytes in blocks of 64
    path, _ = shards.shard_file(tmp_path, record, "tokens")
    content = bytearray(path.read_bytes())
    content[140] ^= 1
    path.write_bytes(content)
    for number in (0, 1, 3, 4):
        shards._check_block(tmp_path, record, "tokens", number)
    with pytest.raises(DataError, match="between bytes 128 and 192"):
        shards._check_block(tmp_path, record, "tokens", 2)
    path.write_bytes(content[:300] + bytes(4))
    with pytest.raises(DataError, match="between bytes 256 and 304"):
        shards._check_block(tmp_path, record, "tokens", 4)


def test_verify_reads_every_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest holds checksums of blocks of 64 bytes; the damage is in the last block of a file."""
    monkeypatch.setattr(shards, "_BLOCK_BYTES", 64)
    shutil.rmtree(folder / "packing", ignore_errors=True)  # plans with checksums of other blocks
    manifest = Manifest.load(folder)
    for record in manifest.shards():
        record.crc32 = {
            suffix: shards.file_crc32(shards.shard_file(folder, record, suffix)[0]) for suffix in record.crc32
        }
    manifest.save(folder)
    verify(folder)
    path = largest_shard(folder)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path} is damaged between bytes \d+ and {len(content)}"):
        verify(folder)


def test_verify_finds_ids_beyond_the_vocabulary(folder: Path) -> None:
    """The largest id is one too many; the files agree with their checksums."""
    manifest = Manifest.load(folder)
    record = manifest.shards()[0]
    path, _ = shards.shard_file(folder, record, "tokens")
    for token, is_wrong in (
        (manifest.tokenizer.vocab_size - 1, False),
        (manifest.tokenizer.vocab_size, True),
    ):
        tokens = np.fromfile(path, dtype="<u4")
        tokens[0] = token
        path.write_bytes(tokens.tobytes())
        record.crc32["tokens"] = shards.file_crc32(path)
        manifest.save(folder)
        if is_wrong:
            with pytest.raises(DataError, match="do not fit together"):
                verify(folder)
        else:
            verify(folder)


def test_documents_are_read_with_the_checksums_of_their_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_BLOCK_BYTES", 64)
    folder = tmp_path / "slices" / "s"
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, "s", "train", 100 * 4)
    documents = [(np.arange(length, dtype=np.uint32), b"x" * (50 - length)) for length in range(5, 40)]
    for number, (ids, fields) in enumerate(documents):
        writer.add(ids, (0, number), fields=fields)
    records = writer.close()
    assert max(record.documents for record in records) > 5
    for suffix in ("tokens", "fields"):
        path, _ = shards.shard_file(tmp_path, records[0], suffix)
        content = bytearray(path.read_bytes())
        content[140] ^= 1
        path.write_bytes(content)
        stream, damaged = TokenStream(tmp_path, records), []
        assert stream.documents == len(documents)
        for number, (ids, fields) in enumerate(documents):
            try:
                tokens, found = stream.read_document(number)
            except DataError as error:
                damaged.append((number, f"{path} is damaged between bytes 128 and 192" in str(error)))
            else:
                assert (tokens.tolist(), found) == (ids.tolist(), fields)
        stream.close()
        sizes = [4 * len(ids) if suffix == "tokens" else len(fields) for ids, fields in documents]
        ends = np.cumsum(sizes[: records[0].documents])
        starts = ends - sizes[: records[0].documents]
        assert damaged == [(n, True) for n in np.flatnonzero((starts < 192) & (ends > 128)).tolist()]
        content[140] ^= 1
        path.write_bytes(content)


def test_verify_lists_everything(folder: Path) -> None:
    tokens = largest_shard(folder)
    tokens.write_bytes(b"")
    offsets = sorted((folder / "slices").rglob("*.offsets"))[-1]
    offsets.write_bytes(bytes(offsets.stat().st_size))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError) as error:
        verify(folder)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"{folder}/tokenizer.json is not the tokenizer")
    assert any(line.startswith(f"{tokens} has 0 bytes") for line in lines)
    assert any(line.startswith(f"{offsets} is damaged between bytes 0 and") for line in lines)


@pytest.mark.parametrize("suffix", ["npz", "items"])
def test_verify_reads_packing_plans(folder: Path, prepared: DataConfig, suffix: str) -> None:
    make_plans(replace(prepared, dir=str(folder), packing="best_fit"), 64)
    verify(folder)
    path = folder / "packing" / f"letters-train-64.{suffix}"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"letters-train-64\.npz or its \.items is damaged; remove both"):
        verify(folder)


def test_verify_finds_offsets_that_do_not_fit_the_tokens(folder: Path) -> None:
    """The files agree with their checksums, but their contents are wrong."""
    manifest = Manifest.load(folder)
    shard = next(shard for shard in manifest.shards() if shard.documents > 1)
    path, _ = shards.shard_file(folder, shard, "offsets")
    offsets = np.fromfile(path, dtype="<u8")
    offsets[1] += 1
    path.write_bytes(offsets.tobytes())
    shard.crc32["offsets"] = f"{zlib.crc32(offsets.tobytes()):08x}"
    manifest.save(folder)
    with pytest.raises(DataError, match=f"{shard.name}: tokens and offsets do not fit together"):
        verify(folder)


def test_manifest_missing_damaged_or_of_another_format(folder: Path) -> None:
    path = folder / "manifest.json"
    fields = json.loads(path.read_bytes())
    path.write_text(json.dumps({**fields, "format": "token-shards-0"}))
    with pytest.raises(DataError, match="format 'token-shards-0' is not 'token-shards-3'"):
        open_prepared(folder)
    path.write_text(json.dumps(fields)[:-500])
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        open_prepared(folder)
    path.unlink()
    with pytest.raises(DataError, match="is missing: the data is not prepared; run python -m data_pipeline"):
        open_prepared(folder)
