"""Text to token shards: cut the sources into slices, survey them, write every slice once, commit with a
manifest.

A run that was killed, however hard, is run again: finished slices stay, and the result is the same to the
byte, for any number of workers.
"""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TextIO

import numpy as np

from data_pipeline.config import DataConfig, DataError
from data_pipeline.documents import Document, read_documents
from data_pipeline.duplicates import find_duplicates
from data_pipeline.inputs import InputFile, plan_slices
from data_pipeline.manifest import (
    FORMAT,
    SPLITS,
    Manifest,
    SourceRecord,
    TokenizerRecord,
    shards_from_json,
    sync_folder,
    write_atomically,
)
from data_pipeline.plan import Plan, agree_on_plan, describe_inputs
from data_pipeline.progress import PrepareProgress
from data_pipeline.readers import BLANK, check_columns, read_rows
from data_pipeline.slices import SliceJob, start_worker, survey_slice, write_slice
from data_pipeline.tokenizer import (
    Tokenizer,
    check_vocab_size,
    fetch_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

_TRAINING_CHARACTERS = 4_000_000  # of text that a tokenizer is trained on, shared evenly by the sources
_TRAINING_PLACES = 16  # slices of a source, evenly spaced, that this text is taken from

Jobs = dict[str, list[SliceJob]]  # by source


def prepare(config: DataConfig, vocab_size: int, seed: int) -> Manifest:
    """Prepare `config.dir` for models of `vocab_size` ids; what is already done is left alone.

    The seed chooses which documents are held out for validation. `config.problems()` must be empty. Raises
    DataError for inputs that cannot be read, a tokenizer that is too large, and a folder that holds another
    preparation (nothing in it is changed).
    """
    given, size = None, config.tokenizer_vocab_size
    if config.tokenizer is not None:
        given = fetch_tokenizer(config.tokenizer)
        size = Tokenizer(given, config.tokenizer).vocab_size
    assert size is not None
    check_vocab_size(size, vocab_size)
    folder = Path(config.dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder), _Workers(config.num_workers) as workers:
        plan = agree_on_plan(config, seed, given, folder)
        if (folder / "manifest.json").exists():
            manifest, outcome = Manifest.load(folder), "already prepared"
        else:
            _clean(folder)
            jobs = {name: _jobs(name, config, plan.inputs[name], seed) for name in sorted(config.sources)}
            if not (folder / "tokenizer.json").exists():  # an earlier attempt may have come so far
                given = given or train_tokenizer(_training_texts(jobs), size)
                write_atomically(folder / "tokenizer.json", given.encode())
            every_job = [job for of_source in jobs.values() for job in of_source]
            to_do = [job for job in every_job if not job.survey.is_dir()]
            workers.run(survey_slice, "survey", "documents", every_job, to_do)
            skipped = _conclude_survey(jobs, config, folder)
            to_do = [job for job in every_job if not job.target.is_dir()]
            workers.run(write_slice, "prepare", "tokens", every_job, to_do)
            _clean(folder)
            manifest, outcome = _commit(plan, jobs, skipped, folder), "prepared"
        shutil.rmtree(folder / "survey", ignore_errors=True)
        (folder / "plan.json").unlink(missing_ok=True)
    print(f"{outcome}: {folder}\n{_summary(manifest)}", flush=True)
    return manifest


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Keep a second preparation out of the folder; the lock ends with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise DataError(f"data.dir={folder} is being prepared by another process; wait for it") from error
    except OSError:
        pass  # a file system without locks: slices are renamed into place, so a second run only wastes work
    try:
        yield
    except OSError as error:  # a full disk, an input without permission
        raise DataError(f"data.dir={folder}: {error}; mend it and run again, which goes on") from error
    finally:
        os.close(descriptor)


def _clean(folder: Path) -> None:
    """Remove what killed workers left half-written."""
    for path in folder.glob(".*.partial"):
        path.unlink()
    for path in [*(folder / "slices").glob(".*"), *(folder / "survey").glob(".*")]:
        shutil.rmtree(path, ignore_errors=True)  # a dying worker may still write there


def _jobs(name: str, config: DataConfig, inputs: list[InputFile], seed: int) -> list[SliceJob]:
    source = config.sources[name]
    slices = plan_slices(source, inputs, config.slice_bytes)
    if not slices:
        raise DataError(
            f"data.sources.{name}.paths: {describe_inputs(inputs)} hold nothing; name files with text"
        )
    check_columns(name, source, (row for part in slices[0] for row in read_rows(source, part)))
    return [SliceJob(f"{name}-{i:05d}", name, parts, config, seed) for i, parts in enumerate(slices)]


def _training_texts(jobs: Jobs) -> Iterator[str]:
    """Text to train a tokenizer on: as much of every source, from evenly spaced places in it."""
    for of_source in jobs.values():
        places = of_source[:: -(-len(of_source) // _TRAINING_PLACES)]
        for job in places:
            left = _TRAINING_CHARACTERS // (len(jobs) * len(places))
            for text in _texts(job):
                if left <= 0:
                    break
                yield text[:left]
                left -= len(text)


def _texts(job: SliceJob) -> Iterator[str]:
    for part in job.parts:
        for item in read_documents(job.config, job.source, part):
            if isinstance(item, Document):
                yield from filter(None, [item.text, *(piece.text for piece in item.pieces or ())])


class _Workers:
    """The processes that act on slices; with num_workers=1 it is this one."""

    def __init__(self, num_workers: int) -> None:
        # spawn: a fork would copy the threads of the tokenizer in an unknown state
        context = multiprocessing.get_context("spawn")
        self._pool = None
        if num_workers > 1:
            self._pool = ProcessPoolExecutor(num_workers, context, initializer=start_worker)

    def run(
        self,
        act: Callable[[SliceJob], int],
        title: str,
        unit: str,
        jobs: list[SliceJob],
        to_do: list[SliceJob],
    ) -> None:
        """Act on the jobs that are not done yet."""
        total = sum(job.bytes for job in jobs)
        with PrepareProgress(title, unit, total, total - sum(job.bytes for job in to_do)) as progress:
            if self._pool is None:
                for job in to_do:
                    progress.done(job.bytes, act(job))
                return
            running = {self._pool.submit(act, job): job for job in to_do}
            try:
                for future in as_completed(running):
                    progress.done(running[future].bytes, future.result())
            except BrokenProcessPool as error:
                raise DataError(
                    "a worker was killed, perhaps for its memory; run again to go on, with a smaller"
                    " data.num_workers if it returns"
                ) from error

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _conclude_survey(jobs: Jobs, config: DataConfig, folder: Path) -> dict[str, Counter[str]]:
    """Write rejects.jsonl, the bad rows of all sources in order, and find the duplicates; every job learns
    the number of its first document.

    Returns the rows that each source leaves out, by the code of the reason. Raises DataError for sources
    with too many bad rows or without a document.
    """
    found, broken = {}, []
    partial = folder / ".rejects.jsonl.partial"
    with open(partial, "w") as rejects:
        for name, of_source in jobs.items():
            skipped, documents = _gather(of_source, rejects)
            bad = skipped.total() - skipped[BLANK]
            if not documents or bad > config.max_bad_fraction * (bad + documents):
                reasons = ", ".join(f"{count} {code}" for code, count in skipped.most_common()) or "no rows"
                law = f"more than data.max_bad_fraction={config.max_bad_fraction} allows"
                broken.append(
                    f"data.sources.{name}: {bad} of {bad + documents} rows are bad ({reasons}),"
                    f" {law if documents else 'it has no document'}; they are listed in"
                    f" {folder}/rejects.jsonl: mend the files or the source"
                )
            hashes = [job.survey / "hashes" for job in of_source]  # empty ones without data.deduplicate
            duplicates = find_duplicates(hashes)
            np.save(of_source[0].duplicates, duplicates)
            found[name] = skipped + Counter(duplicate=len(duplicates))
        rejects.flush()
        os.fsync(rejects.fileno())
    os.replace(partial, folder / "rejects.jsonl")
    sync_folder(folder)
    if broken:
        raise DataError("\n".join(broken))
    return found


def _gather(jobs: list[SliceJob], rejects: TextIO) -> tuple[Counter[str], int]:
    """Append a source's rejects, with lines counted from the start of the file; what it skips, documents."""
    skipped, documents, lines_before = Counter[str](), 0, Counter[str]()
    for job in jobs:
        record = json.loads((job.survey / "record.json").read_bytes())
        job.first_document = documents
        documents += record["documents"]
        skipped.update(record["skipped"])
        with open(job.survey / "rejects.jsonl") as of_slice:
            for text in of_slice:
                fields = json.loads(text)
                fields["line"] += lines_before[fields["file"]]
                rejects.write(json.dumps(fields) + "\n")
        lines_before.update(record["lines"])
    return skipped, documents


def _commit(plan: Plan, jobs: Jobs, skipped: dict[str, Counter[str]], folder: Path) -> Manifest:
    """Gather what the slices hold and write the manifest."""
    tokenizer = load_tokenizer(folder)
    sources = {}
    for name, of_source in jobs.items():
        source = SourceRecord({split: [] for split in SPLITS}, dict(skipped[name]), None)
        unigrams = np.zeros((len(SPLITS), tokenizer.vocab_size), dtype=np.int64)
        for job in of_source:
            unigrams += np.load(job.target / "unigrams.npy")
            shards = shards_from_json(json.loads((job.target / "slice.json").read_bytes()))
            for split in SPLITS:
                source.shards[split] += shards[split]
        if not source.shards["train"]:
            raise DataError(
                f"data.sources.{name}: every document is held out for validation;"
                " lower data.validation_fraction or name more files, in another folder"
            )
        train, validation = unigrams
        if validation.any():
            seen = validation > 0
            shares = (train[seen] + 1) / (train + 1).sum()
            nats = -(validation[seen] * np.log(shares)).sum() / validation.sum()
            source.validation_unigram_cross_entropy = float(nats)
        sources[name] = source
    manifest = Manifest(
        format=FORMAT,
        **plan.as_json(),
        tokenizer=TokenizerRecord(
            sha256=hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
        ),
        sources=sources,
        rejects_sha256=hashlib.sha256((folder / "rejects.jsonl").read_bytes()).hexdigest(),
    )
    manifest.save(folder)
    return manifest


def _summary(manifest: Manifest) -> str:
    lines = []
    for name, source in manifest.sources.items():
        parts = []
        for split, shards in source.shards.items():
            tokens, documents = sum(s.tokens for s in shards), sum(s.documents for s in shards)
            parts.append(f"{split} {tokens:,} tokens of {documents:,} documents")
        skipped = [f"{count:,} {code}" for code, count in sorted(source.skipped.items())]
        left_out = f"; left out: {', '.join(skipped)}" if skipped else ""
        lines.append(f"  {name}: {', '.join(parts)}{left_out}")
    return "\n".join(lines)
