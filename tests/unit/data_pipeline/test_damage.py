"""Wrong bytes in a prepared folder: an error that names the file, or the same tokens. Never another error."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from data_pipeline import shards
from data_pipeline.config import DataConfig, DataError
from data_pipeline.loader import Loader
from data_pipeline.manifest import Manifest
from data_pipeline.packing import make_plans
from data_pipeline.shards import TokenStream, open_prepared, read_arrays, verify

SEQ_LEN = 64


class All(random.Random):
    """Takes a sample that holds everything; each shard here is one block."""

    def choices(self, population: list, *, k: int) -> list:
        return population


@pytest.fixture
def folder(prepared: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the prepared folder with plans of best_fit; every block is checked when it is opened."""
    monkeypatch.setattr(shards, "random", SimpleNamespace(Random=All))
    copied = Path(shutil.copytree(prepared.dir, tmp_path / "copy"))
    make_plans(replace(prepared, dir=str(copied), packing="best_fit"), SEQ_LEN)
    return copied


Damage = tuple[Path, Callable[[bytes], bytes]]


def damages(files: list[Path]) -> st.SearchStrategy[Damage]:
    """A file, and how its content changes: a byte becomes another one, or bytes are removed or added."""

    def flipped(place: int, bits: int) -> Callable[[bytes], bytes]:
        def change(content: bytes) -> bytes:
            at = place % max(len(content), 1)
            return content[:at] + bytes(byte ^ bits for byte in content[at : at + 1]) + content[at + 1 :]

        return change

    flips = st.builds(flipped, st.integers(0, 10**6), st.integers(1, 255))
    bits = st.builds(flipped, st.integers(0, 10**6), st.sampled_from([1, 2, 4, 8, 16, 32]))
    cuts = st.integers(0, 10**6).map(lambda size: lambda content: content[: size % max(len(content), 1)])
    longer = st.binary(min_size=1, max_size=9).map(lambda more: lambda content: content + more)
    return st.tuples(st.sampled_from(files), st.one_of(flips, bits, cuts, longer))


def outcome(damage: Damage, read: Callable[[], Any]) -> tuple[Any, str]:
    """What `read` returns while a file is damaged, or the message of its DataError."""
    path, change = damage
    content = path.read_bytes()
    path.write_bytes(change(content))
    try:
        return read(), ""
    except DataError as error:
        return None, str(error)
    finally:
        path.write_bytes(content)


def all_of(folder: Path) -> dict[str, list[int]]:
    """All that reading gives: tokens, what is learned, where documents begin, and their origins."""
    manifest, found = open_prepared(folder), {}
    for name, source in manifest.sources.items():
        for split, of_split in source.shards.items():
            stream, key = TokenStream(folder, of_split), f"{name} {split}"
            found[key] = stream.read(0, len(stream)).tolist()
            found[f"{key} learned"] = stream.read_loss(0, len(stream)).tolist()
            starts = np.concatenate(list(stream.document_offsets()) or [np.empty(0, np.int64)]).tolist()
            found[f"{key} documents"] = starts
            found[f"{key} places"] = [stream.document_at(token) for token in range(0, len(stream), 200)]
            stream.close()
    found["ids"] = [manifest.tokenizer.end_of_text, manifest.tokenizer.vocab_size]
    return found


@pytest.mark.fuzzing(100, 3000)
def test_damaged_shards_and_manifests_are_named_or_read_the_same(fuzz, folder: Path) -> None:
    files = sorted(
        path for path in (folder / "slices").rglob("*") if path.suffix in (".tokens", ".offsets", ".rows")
    )
    manifest = folder / "manifest.json"
    whole, verdicts = all_of(folder), []

    @fuzz(damages([*files, *[manifest] * len(files)]))
    def holds(damage):
        found, message = outcome(damage, lambda: all_of(folder))
        verdicts.append(bool(message))
        assert found == whole or str(damage[0]) in message

    assert verdicts.count(True) > len(verdicts) / 2


@pytest.mark.fuzzing(60, 2000)
def test_verify_finds_every_change(fuzz, folder: Path) -> None:
    files = sorted(path for path in (folder / "slices").rglob("*.*") if path.suffix not in (".json", ".npy"))
    files += [folder / "tokenizer.json", folder / "rejects.jsonl", folder / "manifest.json"]
    files += sorted((folder / "packing").iterdir()) * 5
    whole = verify(folder)

    @fuzz(damages(files))
    def holds(damage):
        path, change = damage
        found, message = outcome(damage, lambda: verify(folder))
        if message:
            assert str(path.with_suffix("")) in message
            return
        assert found == whole
        # what is no content of theirs may change: dates in the zip format, spaces in JSON
        is_same = change(path.read_bytes()) == path.read_bytes()
        assert is_same or path.suffix == ".npz" or path.name == "manifest.json"


@pytest.mark.fuzzing(40, 1000)
def test_damaged_plans_are_named_or_give_rows(fuzz, folder: Path, prepared: DataConfig) -> None:
    """A wrong item may name another document, which only `verify` finds, but never ends in another error."""
    config = replace(prepared, dir=str(folder), packing="best_fit")
    shape = {"seq_len": SEQ_LEN, "global_batch_size": 4, "micro_batch_size": 4, "rank": 0, "world_size": 1}

    def rows() -> list[list[int]]:
        with Loader(config, **shape, seed=1, source="letters") as loader:
            return [batch.input_ids.flatten().tolist() for [batch] in loader]

    whole = rows()
    plans = sorted(path for path in (folder / "packing").iterdir() if path.name.startswith("letters-train"))
    assert {path.suffix for path in plans} == {".npz", ".items"}

    @fuzz(damages(plans))
    def holds(damage):
        path = damage[0]
        found, message = outcome(damage, rows)
        if path.suffix == ".items" and not message:
            assert len(found) == len(whole)
        else:
            assert found == whole or str(path.with_suffix("")) in message


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)


@pytest.mark.fuzzing(100, 3000)
def test_a_manifest_with_other_values_is_read_or_named(fuzz, folder: Path) -> None:
    """An earlier version wrote no checksum, so that only the form of the values can be checked."""
    path = folder / "manifest.json"
    fields = json.loads(path.read_bytes())
    del fields["crc32"]

    @fuzz(st.sampled_from(sorted(fields)), VALUES)
    def holds(key, value):
        text = json.dumps({**fields, key: value}).encode()
        found, message = outcome((path, lambda _: text), lambda: Manifest.load(folder))
        assert found is not None or str(path) in message


def test_a_manifest_with_one_digit_changed_is_damaged(folder: Path) -> None:
    path = folder / "manifest.json"
    text = path.read_text()
    assert text.count('"end_of_text": 0') == 1
    path.write_text(text.replace('"end_of_text": 0', '"end_of_text": 1'))
    with pytest.raises(
        DataError, match=r"manifest\.json is damaged \(its checksum differs\); move the folder"
    ):
        open_prepared(folder)


def test_a_manifest_of_an_earlier_version_is_read(folder: Path) -> None:
    """Without a checksum."""
    known, path = Manifest.load(folder), folder / "manifest.json"
    fields = json.loads(path.read_bytes())
    del fields["crc32"]
    path.write_text(json.dumps(fields))
    assert Manifest.load(folder) == known


def test_wrong_offsets_are_not_packed(folder: Path, prepared: DataConfig) -> None:
    shard = Manifest.load(folder).sources["letters"].shards["train"][0]
    path, _ = shards.shard_file(folder, shard, "offsets")
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path} is damaged: its checksum is not that of its manifest"):
        make_plans(replace(prepared, dir=str(folder), packing="best_fit"), SEQ_LEN + 1)


def test_a_document_of_no_stream_is_named(folder: Path, prepared: DataConfig) -> None:
    path = folder / "packing" / f"letters-train-{SEQ_LEN}.items"
    items = np.fromfile(path, dtype="<u8")
    items[:] += np.uint64(1 << 40)
    path.write_bytes(items.tobytes())
    config = replace(prepared, dir=str(folder), packing="best_fit")
    shape = {"seq_len": SEQ_LEN, "global_batch_size": 4, "micro_batch_size": 4, "rank": 0, "world_size": 1}
    with (
        Loader(config, **shape, seed=1) as loader,
        pytest.raises(DataError, match=rf"{path} is damaged: no text"),
    ):
        next(loader)


def test_an_array_that_is_said_to_be_shorter_is_damaged(tmp_path: Path) -> None:
    """numpy reads what its header says, and the checksum of the zip format only covers what is read."""
    path = tmp_path / "plan.npz"
    np.savez(path, counts=np.arange(66_000))
    assert read_arrays(path)["counts"].tolist() == list(range(66_000))
    content = path.read_bytes()
    assert content.count(b"(66000,)") == 1
    path.write_bytes(content.replace(b"(66000,)", b"(26000,)"))
    with pytest.raises(ValueError, match=r"the checksum of counts\.npy in it differs"):
        read_arrays(path)
