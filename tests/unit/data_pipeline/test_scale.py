"""Start-up time and memory do not grow with the data: a billion documents, 4 TB of sparse files."""

import functools
import os
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.best_fit import pack_lengths
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.loader import Loader
from data_pipeline.manifest import FORMAT, Manifest, ShardRecord, SourceRecord, TokenizerRecord
from data_pipeline.shards import shard_file

DOCUMENTS, LENGTH, SEQ_LEN = 1_000_000_000, 1000, 4096
BLOCK = 1 << 24
SHARD_DOCUMENTS = (1 << 30) // 4 // LENGTH  # a shard is 1 GiB


def memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@functools.cache
def zero_checksums(size: int) -> str:
    """The crc32 of each block of a file of zeros."""
    whole, rest = divmod(size, BLOCK)
    return f"{zlib.crc32(bytes(BLOCK)):08x}" * whole + (f"{zlib.crc32(bytes(rest)):08x}" if rest else "")


@pytest.fixture(scope="module")
def billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of a billion documents of 1000 tokens 0, in sparse files that take no disk space."""
    folder = tmp_path_factory.mktemp("billion")
    (folder / "slices" / "web-00000").mkdir(parents=True)
    shards = []
    for number in range(-(-DOCUMENTS // SHARD_DOCUMENTS)):
        documents = min(SHARD_DOCUMENTS, DOCUMENTS - number * SHARD_DOCUMENTS)
        tokens = documents * LENGTH
        shard = ShardRecord(
            f"web-00000/train-{number:05d}",
            documents,
            tokens,
            {"tokens": zero_checksums(tokens * 4), "offsets": ""},
        )
        for suffix in shard.crc32:
            path, size = shard_file(folder, shard, suffix)
            with open(path, "wb") as file:
                file.truncate(size)
        shards.append(shard)
    source = SourceRecord({"train": shards, "validation": []}, {}, None)
    tokenizer = TokenizerRecord("", 10, 9)
    Manifest(FORMAT, {}, {}, tokenizer, {"web": source}, "").save(folder)
    counts = np.zeros(SEQ_LEN + 2, dtype=np.int64)
    counts[LENGTH] = DOCUMENTS
    bins = pack_lengths(counts, SEQ_LEN + 1)
    (folder / "packing").mkdir()
    report = np.array([bins.total, DOCUMENTS, DOCUMENTS * LENGTH, 0, 0])
    plan = folder / "packing" / f"web-train-{SEQ_LEN}.npz"
    np.savez(plan, report=report, counts=counts, **bins._asdict())
    with open(plan.with_suffix(".items"), "wb") as file:
        file.truncate(8 * DOCUMENTS)
    return folder


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_billion_documents_start_in_seconds(
    billion: Path, data_config: DataConfig, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    monkeypatch.setattr(Manifest, "check_settings", lambda *_: None)
    web = SourceConfig("jsonl", ["web.jsonl"], "text", 1.0, None)
    config = replace(data_config, dir=str(billion), sources={"web": web}, packing=packing)
    before, started = memory(), time.process_time()
    shape = {"seq_len": SEQ_LEN, "global_batch_size": 8, "micro_batch_size": 8, "rank": 0, "world_size": 1}
    with Loader(config, **shape, seed=1, next_row=150_000_000) as loader:
        [batch] = next(loader)
        assert batch.input_ids.shape == (8, SEQ_LEN)
        assert len(loader._rows["web"]) >= (DOCUMENTS * LENGTH - 1) // SEQ_LEN
        assert time.process_time() - started < 3
        assert memory() - before < 100 * 2**20
