"""One slice of a preparation: surveyed, then written. Each step makes a folder, which appears when complete.

survey/                     removed when the manifest is written
    <source>-00000/         record.json rejects.jsonl hashes repeats.npy
    claims/                 see claims.py
    slices.json conclusion.json
slices/<source>-00000/      shards: see manifest.py
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from data_pipeline.config import DataConfig, DataError
from data_pipeline.documents import Document, Reject, encoded, read_documents
from data_pipeline.manifest import SPLITS, sync, to_json
from data_pipeline.readers import Part, read_rows
from data_pipeline.shards import ShardWriter
from data_pipeline.tokenizer import Tokenizer, load_tokenizer


@dataclass
class SliceJob:
    """Everything that a worker needs. name: the name of the slice's folders."""

    name: str
    source: str
    parts: list[Part]
    config: DataConfig
    seed: int

    def __post_init__(self) -> None:
        self.bytes = sum(part.bytes for part in self.parts)
        self.survey = Path(self.config.dir, "survey", self.name)
        self.target = Path(self.config.dir, "slices", self.name)

    def items(self, tokenizer: Tokenizer | None = None) -> Iterator[Document | Reject]:
        """The documents and rejects, in order."""
        source = self.config.sources[self.source]
        rows = (row for part in self.parts for row in read_rows(source, part))
        return read_documents(self.config, self.source, rows, tokenizer)


def write_slice(job: SliceJob) -> int:
    """Write the shards of a slice; returns its number of tokens. The bytes depend only on the job and the
    survey. Raises DataError for an input that cannot be read."""
    tokenizer = load_tokenizer(job.config.dir)
    unigrams = np.zeros((len(SPLITS), tokenizer.vocab_size), dtype=np.int64)
    digest, repeats = hashlib.sha256(), set(np.load(job.survey / "repeats.npy").tolist())

    def first_of_equals() -> Iterator[Document]:
        documents = (item for item in job.items(tokenizer) if isinstance(item, Document))
        for number, document in enumerate(documents):
            digest.update(document.data)
            if number not in repeats:
                yield document

    with complete_folder(job.target) as folder:
        writers = [ShardWriter(folder, job.name, split, job.config.shard_bytes) for split in SPLITS]
        for document, ids, loss in encoded(tokenizer, first_of_equals()):
            split = int(document.is_held_out(job.seed, job.config.validation_fraction))
            writers[split].add(ids, (document.row.part.file, document.row.offset), loss, document.fields)
            np.add.at(unigrams[split], ids, 1)
        surveyed = json.loads((job.survey / "record.json").read_bytes())
        if surveyed.get("sha256", digest.hexdigest()) != digest.hexdigest():
            raise DataError(changed(*dict.fromkeys(part.path for part in job.parts)))
        shards = {split: of.close() for split, of in zip(SPLITS, writers, strict=True)}
        (folder / "slice.json").write_bytes(to_json(shards))
        np.save(folder / "unigrams.npy", unigrams)
    return int(unigrams.sum())


def changed(*paths: str) -> str:
    """What to say of files that are not those of the plan."""
    what = f"{', '.join(paths)} changed while data was prepared from it"
    return f"{what}; restore it and run again, or name another data.dir"


@contextlib.contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """A folder to fill. It is renamed to `target` at the end, so `target` is always complete."""
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")  # others may write the same slice
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.iterdir(), partial]:
            sync(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # frees the space if the disk is full
        raise
    try:
        partial.rename(target)
    except OSError:  # another process has finished it already, with the same bytes
        if not target.is_dir():
            raise
        shutil.rmtree(partial, ignore_errors=True)
    sync(target.parent)


def start_worker() -> None:
    """Set up a worker: one thread; the parent handles Ctrl-C; exit when the parent ends, even by kill -9."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def die_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()
