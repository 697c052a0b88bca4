"""One slice of a preparation: first surveyed, then written. Each makes a folder, all of it or nothing.

survey/<source>-00000/      removed when the manifest is written
    record.json rejects.jsonl hashes
slices/<source>-00000/      shards: see manifest.py
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.documents import Document, Reject, encoded, read_documents
from data_pipeline.duplicates import hash_document
from data_pipeline.manifest import SPLITS, sync_folder, to_json, write_synced
from data_pipeline.readers import BLANK, Part
from data_pipeline.shards import ShardWriter
from data_pipeline.tokenizer import load_tokenizer


@dataclass
class SliceJob:
    """All that a worker needs. name: that of the slice's folder; first_document: the number of its first
    document in the source, which the survey finds."""

    name: str
    source: str
    parts: list[Part]
    config: DataConfig
    seed: int
    first_document: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of its input."""
        return sum(part.bytes for part in self.parts)

    @property
    def survey(self) -> Path:
        """The folder of the slice's survey."""
        return Path(self.config.dir, "survey", self.name)

    @property
    def duplicates(self) -> Path:
        """The numbers of the source's documents that are left out, as an array."""
        return Path(self.config.dir, "survey", f"{self.source}.npy")

    @property
    def target(self) -> Path:
        """The folder of the finished slice."""
        return Path(self.config.dir, "slices", self.name)


def survey_slice(job: SliceJob) -> int:
    """List the bad rows of a slice and hash its documents; returns their number.

    record.json holds it, the rows that are left out by the code of the reason, and how many lines begin in
    the slice, by file. Raises DataError for an input that cannot be read and, with on_bad_row=error, for a
    bad row.
    """
    documents, skipped, lines, hashes = 0, Counter[str](), {}, bytearray()
    with complete_folder(job.survey) as folder, open(folder / "rejects.jsonl", "w") as rejects:
        for item in _judged(job):
            lines[item.part.path] = item.row.line
            if isinstance(item, Document):
                documents += 1
                if job.config.deduplicate:
                    hashes += hash_document(item.data)
                continue
            skipped[item.code] += 1
            if item.code == BLANK:
                continue
            if job.config.on_bad_row == "error":
                raise item.error()
            fields = {"source": job.source, "file": item.part.path, "line": item.row.line}
            fields |= {"offset": item.row.offset, "reason": item.reason, "head": item.head()}
            if job.config.on_bad_row == "quarantine":
                fields["row"] = item.head(None)
            rejects.write(json.dumps(fields) + "\n")
        write_synced(folder / "hashes", bytes(hashes))
        record = {"documents": documents, "skipped": skipped, "lines": lines}
        write_synced(folder / "record.json", to_json(record))
    return documents


def write_slice(job: SliceJob) -> int:
    """Write the shards of a slice; returns its number of tokens.

    The bytes depend on the job and the survey alone. Raises DataError for an input that cannot be read.
    """
    tokenizer = load_tokenizer(job.config.dir)
    unigrams = np.zeros((len(SPLITS), tokenizer.vocab_size), dtype=np.int64)
    with complete_folder(job.target) as folder:
        writers = [ShardWriter(folder, job.name, split, job.config.shard_bytes) for split in SPLITS]
        for document, ids, loss in encoded(tokenizer, _first_of_equals(job)):
            split = int(document.is_held_out(job.seed, job.config.validation_fraction))
            writers[split].add(ids, (document.part.file, document.row.offset), loss)
            np.add.at(unigrams[split], ids, 1)
        shards = {split: writer.close() for split, writer in zip(SPLITS, writers, strict=True)}
        fields = {split: [asdict(shard) for shard in of_split] for split, of_split in shards.items()}
        write_synced(folder / "slice.json", to_json(fields))
        with open(folder / "unigrams.npy", "wb") as file:
            np.save(file, unigrams)
            file.flush()
            os.fsync(file.fileno())
    return int(unigrams.sum())


@contextlib.contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` at the end: nobody ever sees a part of it there."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # gives its space back where the disk is full
        raise
    sync_folder(partial)
    try:
        partial.rename(target)
    except OSError:  # a worker that outlived its killed parent was faster: its bytes are the same
        if not target.is_dir():
            raise
        shutil.rmtree(partial)
    sync_folder(target.parent)


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


def _judged(job: SliceJob) -> Iterator[Document | Reject]:
    """The documents and rejects of a slice, in order."""
    is_limited = job.config.max_chat_tokens is not None and job.config.sources[job.source].kind == "sft"
    tokenizer = load_tokenizer(job.config.dir) if is_limited else None
    for part in job.parts:
        yield from read_documents(job.config, job.source, part, tokenizer)


def _first_of_equals(job: SliceJob) -> Iterator[Document]:
    """The documents of a slice that the survey did not find to be repeats."""
    repeats = np.load(job.duplicates, mmap_mode="r")
    next_repeat = int(np.searchsorted(repeats, job.first_document))
    documents = (item for item in _judged(job) if isinstance(item, Document))
    for number, document in enumerate(documents, job.first_document):
        if next_repeat < len(repeats) and repeats[next_repeat] == number:
            next_repeat += 1
        else:
            yield document
