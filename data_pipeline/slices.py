"""One slice of a preparation: documents in, a folder of shards out, all of it or nothing."""

import contextlib
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

from data_pipeline import chat
from data_pipeline.config import DataConfig, DataError
from data_pipeline.documents import Document, Reject, read_documents
from data_pipeline.manifest import SPLITS, SplitRecord, split_record, sync_folder, to_json
from data_pipeline.readers import Part
from data_pipeline.shards import TOKEN, ShardWriter
from data_pipeline.tokenizer import Tokenizer, load_tokenizer_once

_BATCH_BYTES = 1 << 20


@dataclass
class SliceJob:
    """All that a worker needs. name: that of the slice's folder; first_document: the number of its first
    document in the source, which the survey finds."""

    name: str
    source: str
    parts: list[Part]
    config: DataConfig
    tokenizer_sha256: str
    seed: int
    first_document: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of its input."""
        return sum(part.bytes for part in self.parts)

    @property
    def folder(self) -> Path:
        """The folder that is prepared."""
        return Path(self.config.dir)

    @property
    def survey(self) -> Path:
        """The folder of the slice's survey."""
        return self.folder / "survey" / self.name

    @property
    def duplicates(self) -> Path:
        """The numbers of the source's documents that are left out."""
        return self.folder / "survey" / f"{self.source}.npy"

    @property
    def target(self) -> Path:
        """The folder of the finished slice."""
        return self.folder / "slices" / self.name


@dataclass
class SliceRecord:
    """What a finished slice holds."""

    splits: dict[str, SplitRecord]
    unigrams: np.ndarray  # [split, vocab_size] int64: how often each id occurs

    @staticmethod
    def load(target: Path) -> "SliceRecord":
        """Read back what `write_slice` wrote."""
        fields = json.loads((target / "slice.json").read_bytes())
        splits = {split: split_record(fields["splits"][split]) for split in SPLITS}
        return SliceRecord(splits, np.load(target / "unigrams.npy"))


def write_slice(job: SliceJob) -> int:
    """Write a slice to its target folder, which appears when it is complete; returns its number of tokens.

    The bytes depend on the job and the survey alone. Raises DataError for an input that cannot be read.
    """
    with complete_folder(job.target) as folder:
        record = _write_shards(job, folder)
        fields = {"splits": {split: asdict(record.splits[split]) for split in SPLITS}}
        write_synced(folder / "slice.json", to_json(fields))
        with open(folder / "unigrams.npy", "wb") as file:
            np.save(file, record.unigrams)
            file.flush()
            os.fsync(file.fileno())
    return sum(split.tokens for split in record.splits.values())


@contextlib.contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` at the end: nobody ever sees a part of it there."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    yield partial
    sync_folder(partial)
    try:
        partial.rename(target)
    except OSError:  # a worker that outlived its killed parent was faster: its bytes are the same
        if not target.is_dir():
            raise
        shutil.rmtree(partial)
    sync_folder(target.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


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


def _write_shards(job: SliceJob, folder: Path) -> SliceRecord:
    tokenizer = load_tokenizer_once(job.folder, job.tokenizer_sha256)
    writers = {split: ShardWriter(folder, job.name, split, job.config.shard_bytes) for split in SPLITS}
    splits = {split: SplitRecord(documents=0, tokens=0, bytes=0, shards=[]) for split in SPLITS}
    unigrams = np.zeros((len(SPLITS), tokenizer.vocab_size), dtype=np.int64)
    for document, ids, loss in _encoded(tokenizer, _first_of_equals(job)):
        split = _split_of(document.data, job.seed, job.config.validation_fraction)
        writers[split].add(ids, (document.part.file, document.row.offset), loss)
        splits[split].documents += 1
        splits[split].tokens += len(ids)
        splits[split].bytes += sum(len(text.encode()) for text in document.texts())
        np.add.at(unigrams[SPLITS.index(split)], ids, 1)
    for split, writer in writers.items():
        splits[split].shards = writer.close()
    return SliceRecord(splits, unigrams)


def judged(job: SliceJob) -> Iterator[Document | Reject]:
    """The documents and rejects of a slice, in order; conversations that are too long are rejects."""
    most = job.config.max_chat_tokens
    for part in job.parts:
        for item in read_documents(job.config, job.source, part):
            # a token is at least a byte: most conversations need not be counted
            if most is not None and isinstance(item, Document) and item.pieces and len(item.data) > most:
                tokenizer = load_tokenizer_once(job.folder, job.tokenizer_sha256)
                length = len(chat.encode(item.pieces, tokenizer)[0]) + 1
                if length > most:
                    yield Reject(part, item.row, f"too_long: {length} tokens")
                    continue
            yield item


def _first_of_equals(job: SliceJob) -> Iterator[Document]:
    """The documents of a slice that the survey did not find to be repeats."""
    deduplicate = job.config.deduplicate
    repeats = np.load(job.duplicates, mmap_mode="r") if deduplicate else np.empty(0, np.int64)
    next_repeat = int(np.searchsorted(repeats, job.first_document))
    documents = (item for item in judged(job) if isinstance(item, Document))
    for number, document in enumerate(documents, job.first_document):
        if next_repeat < len(repeats) and repeats[next_repeat] == number:
            next_repeat += 1
        else:
            yield document


def _encoded(
    tokenizer: Tokenizer, documents: Iterable[Document]
) -> Iterator[tuple[Document, np.ndarray, np.ndarray | None]]:
    """Documents with their ids, closed by the end-of-text id, and, for conversations, what is learned."""
    for batch in _batches(documents):
        texts = iter(tokenizer.encode_batch([item.text for item in batch if item.pieces is None]))
        for document in batch:
            loss = None
            if document.pieces is None:
                ids = np.array(next(texts), dtype=TOKEN)
            else:
                ids, loss = chat.encode(document.pieces, tokenizer)
                loss = np.append(loss, False)
            if (ids == tokenizer.end_of_text).any():
                raise DataError(
                    "the tokenizer makes its end-of-text id from plain text, so documents would be cut there;"
                    " use a tokenizer whose model cannot produce it"
                )
            yield document, np.append(ids, tokenizer.end_of_text).astype(TOKEN), loss


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.data)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _split_of(data: bytes, seed: int, validation_fraction: float) -> str:
    """By the document's hash: equal documents fall on the same side, wherever they stand."""
    digest = hashlib.blake2b(data, digest_size=8, key=str(seed).encode()).digest()
    return "validation" if int.from_bytes(digest, "little") < validation_fraction * 2**64 else "train"
