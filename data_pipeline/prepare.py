"""Text to token shards: cut the sources into slices, survey them, write every slice once, commit with a
manifest.

A run that was killed, however hard, is run again: finished slices stay, and the result is the same to the
byte, for any number of workers.
"""

import contextlib
import fcntl
import hashlib
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from data_pipeline.config import DataConfig, DataError
from data_pipeline.documents import Document, read_documents
from data_pipeline.inputs import InputFile, plan_slices
from data_pipeline.manifest import (
    FORMAT,
    SPLITS,
    Manifest,
    SourceRecord,
    SplitRecord,
    TokenizerRecord,
    write_atomically,
)
from data_pipeline.plan import Plan, agree_on_plan, describe_inputs
from data_pipeline.progress import PrepareProgress
from data_pipeline.readers import check_columns
from data_pipeline.slices import SliceJob, SliceRecord, start_worker, write_slice
from data_pipeline.survey import bad_rows, conclude, survey_slice
from data_pipeline.tokenizer import Tokenizer, fetch_tokenizer, load_tokenizer, train_tokenizer

_TRAINING_CHARACTERS = 4_000_000  # of text that a tokenizer is trained on, shared evenly by the sources
_TRAINING_PLACES = 16  # slices of a source, evenly spaced, that this text is taken from


def prepare(config: DataConfig, vocab_size: int, seed: int) -> Manifest:
    """Prepare `config.dir` for models of `vocab_size` ids; what is already done is left alone.

    The seed chooses which documents are held out for validation. `config.problems()` must be empty. Raises
    DataError for inputs that cannot be read, a tokenizer that is too large, and a folder that holds another
    preparation (nothing in it is changed).
    """
    given = None if config.tokenizer is None else fetch_tokenizer(config.tokenizer)
    _check_vocabulary(config, given, vocab_size)
    folder = Path(config.dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder):
        plan = agree_on_plan(config, seed, given, folder)
        if (folder / "manifest.json").exists():
            manifest, outcome = Manifest.load(folder), "already prepared"
        else:
            _clean(folder)
            jobs = {name: _jobs(name, config, plan.inputs[name], seed) for name in sorted(config.sources)}
            _settle_tokenizer(config, given, jobs, folder)
            every_job = [job for of_source in jobs.values() for job in of_source]
            to_do = [job for job in every_job if not job.survey.is_dir()]
            _run(survey_slice, "survey", "documents", every_job, to_do, config.num_workers)
            skipped = conclude(jobs, config, folder)
            to_do = [job for job in every_job if not job.target.is_dir()]
            _run(write_slice, "prepare", "tokens", every_job, to_do, config.num_workers)
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
    finally:
        os.close(descriptor)


def _clean(folder: Path) -> None:
    """Remove what killed workers left half-written."""
    for path in folder.glob(".*.partial"):
        path.unlink()
    for path in [*(folder / "slices").glob(".*"), *(folder / "survey").glob(".*")]:
        shutil.rmtree(path, ignore_errors=True)  # a dying worker may still write there


def _check_vocabulary(config: DataConfig, given: str | None, vocab_size: int) -> None:
    """Raise DataError before any work if the tokenizer is larger than the model's vocabulary."""
    if given is None:
        assert config.tokenizer_vocab_size is not None
        key, size = f"data.tokenizer_vocab_size={config.tokenizer_vocab_size}", config.tokenizer_vocab_size
    else:
        size = Tokenizer(given, config.tokenizer or "").vocab_size
        key = f"data.tokenizer={config.tokenizer}, which has {size} ids,"
    if size > vocab_size:
        raise DataError(
            f"{key} is larger than model.vocab_size={vocab_size}; raise model.vocab_size to it or beyond"
        )


def _jobs(name: str, config: DataConfig, inputs: list[InputFile], seed: int) -> list[SliceJob]:
    source = config.sources[name]
    slices = plan_slices(source, inputs, config.slice_bytes)
    if not slices:
        raise DataError(
            f"data.sources.{name}.paths: {describe_inputs(inputs)} hold nothing; name files with text"
        )
    check_columns(name, source, slices[0])
    return [
        SliceJob(f"{name}-{number:05d}", name, parts, config, tokenizer_sha256="", seed=seed)
        for number, parts in enumerate(slices)
    ]


def _settle_tokenizer(
    config: DataConfig, given: str | None, jobs: dict[str, list[SliceJob]], folder: Path
) -> None:
    """Write tokenizer.json, unless an earlier attempt has, and tell every job its sha256."""
    path = folder / "tokenizer.json"
    if not path.exists():
        if given is None:
            assert config.tokenizer_vocab_size is not None
            given = train_tokenizer(_training_texts(jobs), config.tokenizer_vocab_size)
        write_atomically(path, given.encode())
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    for of_source in jobs.values():
        for job in of_source:
            job.tokenizer_sha256 = sha256


def _training_texts(jobs: dict[str, list[SliceJob]]) -> Iterator[str]:
    """Text to train a tokenizer on: as much of every source, from evenly spaced places in it."""
    for of_source in jobs.values():
        places = of_source[:: -(-len(of_source) // _TRAINING_PLACES)]
        for job in places:
            left = _TRAINING_CHARACTERS // (len(jobs) * len(places))
            for text in _texts(job):
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    break


def _texts(job: SliceJob) -> Iterator[str]:
    for part in job.parts:
        for item in read_documents(job.config, job.source, part):
            if isinstance(item, Document):
                yield from item.texts()


def _run(
    act: Callable[[SliceJob], int],
    title: str,
    unit: str,
    jobs: list[SliceJob],
    to_do: list[SliceJob],
    num_workers: int,
) -> None:
    """Let the workers act on the jobs that are not done yet."""
    total = sum(job.bytes for job in jobs)
    with PrepareProgress(title, unit, total, total - sum(job.bytes for job in to_do)) as progress:
        if num_workers == 1:
            for job in to_do:
                progress.advance(job.bytes, act(job))
            return
        # spawn: a fork would copy the threads of the tokenizer in an unknown state
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_workers, context, initializer=start_worker) as pool:
            running = {pool.submit(act, job): job for job in to_do}
            try:
                for future in as_completed(running):
                    progress.advance(running[future].bytes, future.result())
            except BrokenProcessPool as error:
                raise DataError(
                    f"a worker of data.num_workers={num_workers} was killed, perhaps for its memory;"
                    " run again to go on, with fewer workers if it returns"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)


def _commit(
    plan: Plan, jobs: dict[str, list[SliceJob]], skipped: dict[str, Counter[str]], folder: Path
) -> Manifest:
    """Gather what the slices hold and write the manifest."""
    tokenizer = load_tokenizer(folder)
    unigrams = {name: np.zeros((len(SPLITS), tokenizer.vocab_size), dtype=np.int64) for name in jobs}
    sources = {}
    for name, of_source in jobs.items():
        splits = {split: SplitRecord(documents=0, tokens=0, bytes=0, shards=[]) for split in SPLITS}
        for job in of_source:
            record = SliceRecord.load(job.target)
            unigrams[name] += record.unigrams
            for split, part in record.splits.items():
                splits[split].documents += part.documents
                splits[split].tokens += part.tokens
                splits[split].bytes += part.bytes
                splits[split].shards += part.shards
        if not splits["train"].documents:
            raise DataError(
                f"data.sources.{name}: all {splits['validation'].documents} documents are held out for"
                " validation; lower data.validation_fraction or name more files, in another folder"
            )
        train, validation = unigrams[name]
        sources[name] = SourceRecord(
            splits,
            skipped=dict(skipped[name]),
            rejected=bad_rows(skipped[name]),
            unigram_entropy=_cross_entropy(train, train),
            validation_unigram_cross_entropy=_cross_entropy(validation, train + 1)
            if validation.any()
            else None,
        )
    manifest = Manifest(
        format=FORMAT,
        settings=plan.settings,
        inputs=plan.inputs_as_json(),
        tokenizer=TokenizerRecord(
            sha256=hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
            max_token_id=max(int(np.flatnonzero(counts.any(axis=0))[-1]) for counts in unigrams.values()),
        ),
        sources=sources,
        rejects_sha256=hashlib.sha256((folder / "rejects.jsonl").read_bytes()).hexdigest(),
    )
    manifest.save(folder)
    return manifest


def _cross_entropy(counts: np.ndarray, model_counts: np.ndarray) -> float:
    """Nats per token of `counts` when ids are predicted by their share of `model_counts`."""
    seen = counts > 0
    shares = model_counts[seen] / model_counts.sum()
    return float(-(counts[seen] * np.log(shares)).sum() / counts.sum())


def _summary(manifest: Manifest) -> str:
    lines = []
    for name, source in manifest.sources.items():
        parts = [
            f"{split} {part.tokens:,} tokens of {part.documents:,} documents"
            for split, part in source.splits.items()
        ]
        skipped = [f"{count:,} {code}" for code, count in sorted(source.skipped.items())]
        left_out = f"; left out: {', '.join(skipped)}" if skipped else ""
        lines.append(f"  {name}: {', '.join(parts)}{left_out}")
    return "\n".join(lines)
