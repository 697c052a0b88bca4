"""One slice of a preparation: documents in, a folder of shards out, all of it or nothing."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from data_pipeline.config import DataError, SourceConfig
from data_pipeline.manifest import SPLITS, SplitRecord, split_record, sync_folder, to_json
from data_pipeline.readers import Piece, Reject, read_slice
from data_pipeline.shards import ShardWriter
from data_pipeline.tokenizer import Tokenizer, load_tokenizer_once

_BATCH_CHARACTERS = 1 << 20


@dataclass
class SliceJob:
    """All that a worker needs; `name` is that of the slice's folder, `bytes` those of its input."""

    name: str
    source: SourceConfig
    pieces: list[Piece]
    bytes: int
    folder: Path
    tokenizer_sha256: str
    seed: int
    validation_fraction: float
    shard_bytes: int

    @property
    def target(self) -> Path:
        """The folder of the finished slice."""
        return self.folder / "slices" / self.name


@dataclass
class SliceRecord:
    """What a finished slice holds."""

    splits: dict[str, SplitRecord]
    rejected: int
    unigrams: np.ndarray  # [split, vocab_size] int64: how often each id occurs

    @staticmethod
    def load(target: Path) -> "SliceRecord":
        """Read back what `write_slice` wrote."""
        fields = json.loads((target / "slice.json").read_bytes())
        splits = {split: split_record(fields["splits"][split]) for split in SPLITS}
        return SliceRecord(splits, fields["rejected"], np.load(target / "unigrams.npy"))


def write_slice(job: SliceJob) -> int:
    """Write a slice to its target folder, which appears when it is complete; returns its number of tokens.

    The bytes depend on the job alone. Raises DataError for an input that cannot be read.
    """
    partial = job.target.with_name(f".{job.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    rejects: list[Reject] = []
    texts = read_slice(job.source, job.pieces, rejects.append)
    record = _write_shards(job, partial, texts)
    record.rejected = len(rejects)
    fields = {
        "splits": {split: asdict(record.splits[split]) for split in SPLITS},
        "rejected": record.rejected,
    }
    _write(partial / "slice.json", to_json(fields))
    with open(partial / "unigrams.npy", "wb") as file:
        np.save(file, record.unigrams)
        file.flush()
        os.fsync(file.fileno())
    if rejects:
        lines = (json.dumps(reject._asdict(), sort_keys=True) + "\n" for reject in rejects)
        _write(partial / "rejects.jsonl", "".join(lines).encode())
    sync_folder(partial)
    try:
        partial.rename(job.target)
    except OSError:  # a worker that outlived its killed parent was faster: its bytes are the same
        if not job.target.is_dir():
            raise
        shutil.rmtree(partial)
    sync_folder(job.target.parent)
    return sum(split.tokens for split in record.splits.values())


def start_worker() -> None:
    """Set up a worker: one thread, Ctrl-C left to the parent, and death with the parent, even by kill -9."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def die_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()


def _write_shards(job: SliceJob, folder: Path, texts: Iterable[str]) -> SliceRecord:
    tokenizer = load_tokenizer_once(job.folder, job.tokenizer_sha256)
    writers = {split: ShardWriter(folder, job.name, split, job.shard_bytes) for split in SPLITS}
    splits = {split: SplitRecord(documents=0, tokens=0, bytes=0, shards=[]) for split in SPLITS}
    unigrams = np.zeros((len(SPLITS), tokenizer.vocab_size), dtype=np.int64)
    for text, ids in _encoded(tokenizer, texts):
        data = text.encode()
        split = _split_of(data, job.seed, job.validation_fraction)
        writers[split].add(ids)
        splits[split].documents += 1
        splits[split].tokens += len(ids)
        splits[split].bytes += len(data)
        np.add.at(unigrams[SPLITS.index(split)], ids, 1)
    for split, writer in writers.items():
        splits[split].shards = writer.close()
    return SliceRecord(splits, 0, unigrams)


def _encoded(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Texts with their ids, closed by the end-of-text id."""
    for batch in _batches(texts):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            if tokenizer.end_of_text in ids:
                raise DataError(
                    "the tokenizer makes its end-of-text id from plain text, so documents would be cut there;"
                    " use a tokenizer whose model cannot produce it"
                )
            yield text, np.array([*ids, tokenizer.end_of_text], dtype=np.uint32)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _split_of(data: bytes, seed: int, validation_fraction: float) -> str:
    """By the document's hash: equal documents fall on the same side, wherever they stand."""
    digest = hashlib.blake2b(data, digest_size=8, key=str(seed).encode()).digest()
    return "validation" if int.from_bytes(digest, "little") < validation_fraction * 2**64 else "train"


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
