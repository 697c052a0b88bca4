"""From text to token shards: cut the sources into slices, survey and write every slice, write the manifest.

After a kill, run the same command again: finished slices are kept, and the result is the same, byte for
byte, for any number of workers. Processes that prepare the same folder share the steps: see claims.py.
"""

import contextlib
import hashlib
import json
import multiprocessing
import shutil
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from data_pipeline.claims import Step, is_complete, open_folder, take_part, undone
from data_pipeline.config import DataConfig, DataError
from data_pipeline.documents import Document, check_columns, word_sequences
from data_pipeline.files import version
from data_pipeline.inputs import Known, list_files, list_inputs
from data_pipeline.manifest import (
    FORMAT,
    SPLITS,
    InputFile,
    Manifest,
    SourceRecord,
    TokenizerRecord,
    sha256_of,
    shards_from_json,
    to_json,
    write_atomically,
)
from data_pipeline.progress import CONCLUSION, SLICES
from data_pipeline.readers import plan_slices, read_rows
from data_pipeline.slices import SliceJob, changed, start_worker, write_slice
from data_pipeline.survey import check_survey, conclude_survey, survey_slice
from data_pipeline.tokenizer import (
    Tokenizer,
    check_vocab_size,
    fetch_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

_TRAINING_CHARACTERS = 4_000_000  # of text to train a tokenizer on, divided evenly among the sources
_TRAINING_PLACES = 16  # at most this many evenly spaced slices of a source provide this text
_SECONDS_BETWEEN_LINES = 10.0

Jobs = dict[str, list[SliceJob]]  # by source


def prepare(config: DataConfig, vocab_size: int, seed: int, *, begin: float = 0.0) -> Manifest:
    """Prepare `config.dir` for models of `vocab_size` ids; work that is already done is kept.

    Other processes, also of other machines, may prepare the folder at the same time: they share the steps.
    `begin`, from 0 to 1: where in the slices this process begins, so that processes seldom want the same. The
    seed chooses which documents are held out for validation. Raises DataError for inputs that cannot be read,
    a tokenizer that is too large, and a folder with a different preparation (which stays as it is).
    """
    given = None if config.tokenizer is None else fetch_tokenizer(config.tokenizer)
    size = given.vocab_size if given else config.tokenizer_vocab_size
    assert size is not None
    check_vocab_size(size, vocab_size)
    folder = Path(config.dir)
    open_folder(folder)
    # spawn, because a fork would copy the state of the tokenizer's threads at a random moment
    spawn, number = multiprocessing.get_context("spawn"), config.num_workers
    pool = ProcessPoolExecutor(number, spawn, initializer=start_worker) if number > 1 else None
    with _told(folder), pool or contextlib.nullcontext() as workers:
        complete = is_complete(folder)
        try:
            _take_steps(config, seed, given, workers, begin)
        except (DataError, OSError):
            if complete or not is_complete(folder):
                raise
            _agree_on_plan(config, seed, given)  # others completed it, and removed what was read here
        _clean(folder)
        _remove(folder / "survey")
        (folder / "plan.json").unlink(missing_ok=True)
    manifest, outcome = Manifest.load(folder), "already prepared" if complete else "prepared"
    print(f"{outcome}: {folder}\n{_summary(manifest)}", flush=True)
    return manifest


def _take_steps(
    config: DataConfig, seed: int, given: Tokenizer | None, workers: Executor | None, begin: float
) -> None:
    """All steps of a preparation, in order; each is done by one of the processes that prepare the folder."""
    folder, plan = Path(config.dir), _agree_on_plan(config, seed, given)
    if is_complete(folder):
        return
    jobs = _jobs(config, plan, seed)
    write_atomically(folder / SLICES, to_json({job.name: job.bytes for of in jobs.values() for job in of}))
    _take(folder, "tokenizer", folder / "tokenizer.json", partial(_write_tokenizer, config, given, jobs))
    every = [job for of_source in jobs.values() for job in of_source]
    every = every[(first := int(begin * len(every))) :] + every[:first]
    steps = [Step(f"survey-{job.name}", job.survey, partial(survey_slice, job), job.bytes) for job in every]
    _share(folder, workers, "survey", "documents", steps)
    _take(folder, "conclude", folder / CONCLUSION, partial(conclude_survey, jobs, folder))
    sources = check_survey(config)
    steps = [Step(f"write-{job.name}", job.target, partial(write_slice, job), job.bytes) for job in every]
    _share(folder, workers, "prepare", "tokens", steps)
    _take(folder, "commit", folder / "manifest.json", partial(_commit, plan, jobs, sources, folder))


def _take(folder: Path, name: str, result: Path, act: Callable[[], None]) -> None:
    """A step that one process does while the others wait."""
    for _ in take_part(folder, [Step(name, result, act)]):
        pass


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Turn errors of the machine into a DataError that says how to go on."""
    try:
        yield
    except OSError as error:  # such as a full disk, or an input without read permission
        raise DataError(f"data.dir={folder}: {error}; fix this and run again to go on") from error
    except BrokenProcessPool as error:
        what = "a worker was killed, perhaps for lack of memory; run again to go on, with a smaller"
        raise DataError(f"{what} data.num_workers if it happens again") from error


def _clean(folder: Path) -> None:
    """Remove what killed processes left, from a folder that is complete."""
    for path in [*folder.glob(".*.partial"), *(folder / "slices").glob(".*")]:
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a file or folder, which other processes may be removing too."""
    with contextlib.suppress(OSError):  # a slow process may still write there, or has just finished it
        if path.suffix != ".partial":  # else another process could complete a half-removed folder
            path = path.rename(path.parent / f".{uuid.uuid4().hex}.partial")
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _agree_on_plan(config: DataConfig, seed: int, given: Tokenizer | None) -> Manifest:
    """The plan of this preparation. Raises DataError if the folder holds a different plan."""
    folder = Path(config.dir)
    if not is_complete(folder):
        _take(folder, "plan", folder / "plan.json", partial(_save_plan, config, seed, given))
    recorded = Manifest.load(folder, "manifest.json" if is_complete(folder) else "plan.json")
    known = {file.path: file for files in recorded.inputs.values() for file in files}
    now = _plan(config, seed, given, known)
    recorded.check_settings(now.settings, folder)
    return now


def _save_plan(config: DataConfig, seed: int, given: Tokenizer | None) -> None:
    plan = _plan(config, seed, given, {})
    _jobs(config, plan, seed)  # a source or a benchmark that cannot be read must not fix the rest
    word_sequences(config.exclude)
    plan.save(Path(config.dir), "plan.json")


def _plan(config: DataConfig, seed: int, given: Tokenizer | None, known: Known) -> Manifest:
    inputs = {name: list_inputs(name, source, known) for name, source in config.sources.items()}
    described = {f"data.sources.{name}.paths": _described(files) for name, files in inputs.items()}
    settings = {
        **config.content_settings(),
        "data.tokenizer": f"sha256 {_sha256(given.serialized)}" if given else None,
        "data.on_bad_row": "quarantine" if config.on_bad_row == "quarantine" else "skip or error",
        "data.slice_bytes": config.slice_bytes,
        "data.shard_bytes": config.shard_bytes,
        "seed": seed,
        "data.exclude": _described(list_files("data.exclude", config.exclude, known)),
        **described,
    }
    return Manifest(FORMAT, settings, inputs, TokenizerRecord("", 0, 0), {}, "")


def _described(files: list[InputFile]) -> str | None:
    """What tells files from others, without their paths; None for no files."""
    digest = _sha256("".join(file.sha256 or str(file.mtime_ns) for file in files))[:12]
    size = sum(file.bytes for file in files)
    return f"{len(files)} files of {size} bytes (sha256 {digest})" if files else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _jobs(config: DataConfig, plan: Manifest, seed: int) -> Jobs:
    return {name: _jobs_of(name, config, plan.inputs[name], seed) for name in sorted(plan.inputs)}


def _jobs_of(name: str, config: DataConfig, inputs: list[InputFile], seed: int) -> list[SliceJob]:
    source = config.sources[name]
    slices = plan_slices(source, inputs, config.slice_bytes)
    if not slices:
        files = ", ".join(file.path for file in inputs)
        raise DataError(f"data.sources.{name}.paths: no content in {files}; name files with text")
    check_columns(name, source, (row for part in slices[0] for row in read_rows(source, part)))
    return [SliceJob(f"{name}-{i:05d}", name, parts, config, seed) for i, parts in enumerate(slices)]


def _write_tokenizer(config: DataConfig, given: Tokenizer | None, jobs: Jobs) -> None:
    size = config.tokenizer_vocab_size or 0  # None if it is given
    text = given.serialized if given else train_tokenizer(_training_texts(jobs), size)
    write_atomically(Path(config.dir, "tokenizer.json"), text.encode())


def _training_texts(jobs: Jobs) -> Iterator[str]:
    """Text to train a tokenizer on: the same amount of every source, from evenly spaced slices."""
    for of_source in jobs.values():
        places = of_source[:: -(-len(of_source) // _TRAINING_PLACES)]
        for job in places:
            left = _TRAINING_CHARACTERS // (len(jobs) * len(places))
            for document in (item for item in job.items() if isinstance(item, Document)):
                for text in filter(None, [document.text, *(of.text for of in document.pieces or ())]):
                    yield text[:left]
                    left = max(left - len(text), 0)
                if not left:
                    break


def _share(folder: Path, pool: Executor | None, title: str, unit: str, steps: list[Step]) -> None:
    """Take part in the steps of a phase. Shows a bar on a terminal, and prints a line every ten seconds
    elsewhere, of what all processes have done; the rate is in `unit` per second of this process."""
    units, started = 0, time.monotonic()
    total, last_look = sum(step.bytes for step in steps), started
    columns = TextColumn(title), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}")
    with Progress(*columns, TimeRemainingColumn(), disable=not sys.stdout.isatty()) as progress:
        before = total - sum(step.bytes for step in undone(steps))
        bar = progress.add_task(title, total=total, completed=before, rate="")
        for more in take_part(folder, steps, pool):
            now, units = time.monotonic(), units + more
            if now - last_look < (_SECONDS_BETWEEN_LINES if progress.disable else 1.0):
                continue
            left, last_look = sum(step.bytes for step in undone(steps)), now
            rate = f"{units / (now - started):,.0f} {unit}/s"
            progress.update(bar, completed=total - left, rate=rate)
            if progress.disable:
                seconds = left * (now - started) / max(total - left - before, 1)
                print(f"{title}: {1 - left / total:.0%}, {rate}, {seconds:,.0f} s left", flush=True)


def _commit(plan: Manifest, jobs: Jobs, sources: dict[str, SourceRecord], folder: Path) -> None:
    """Complete the records of the sources by those of their slices, and write the manifest."""
    tokenizer = load_tokenizer(folder)
    for name, of_source in jobs.items():
        source = sources[name]
        none = np.zeros((len(SPLITS), tokenizer.vocab_size), dtype=np.int64)
        train, validation = sum((np.load(job.target / "unigrams.npy") for job in of_source), start=none)
        for job in of_source:
            shards = shards_from_json(json.loads((job.target / "slice.json").read_bytes()))
            for split in SPLITS:
                source.shards[split] += shards[split]
        if not source.shards["train"]:
            what = f"data.sources.{name}: every document is held out for validation"
            raise DataError(f"{what}; lower data.validation_fraction or add files, and use a new data.dir")
        if validation.any():
            seen = validation > 0
            shares = (train[seen] + 1) / (train + 1).sum()
            nats = -(validation[seen] * np.log(shares)).sum() / validation.sum()
            source.validation_unigram_cross_entropy = float(nats)
    identity = sha256_of(folder / "tokenizer.json"), tokenizer.vocab_size, tokenizer.end_of_text
    digest = sha256_of(folder / "rejects.jsonl")
    inputs = [file for files in plan.inputs.values() for file in files if file.mtime_ns]  # 0: embedded
    if edited := [file.path for file in inputs if version(file.path) != (file.bytes, file.mtime_ns)]:
        raise DataError(changed(*edited))
    manifest = replace(plan, tokenizer=TokenizerRecord(*identity), sources=sources, rejects_sha256=digest)
    manifest.save(folder)


def _summary(manifest: Manifest) -> str:
    lines = []
    for name, source in manifest.sources.items():
        parts = [
            f"{split} {sum(s.tokens for s in of):,} tokens of {sum(s.documents for s in of):,} documents"
            for split, of in source.shards.items()
        ]
        skipped = ", ".join(f"{count:,} {code}" for code, count in sorted(source.skipped.items()))
        lines.append(f"  {name}: {', '.join(parts)}{skipped and f'; left out: {skipped}'}")
        if source.ignored:
            counts = Counter(source.ignored).most_common()
            keys = ", ".join(f"{key!r} in {count:,}" for key, count in counts)
            lines.append(f"  {name}: keys of messages that are not used, and in how many documents: {keys}")
    return "\n".join(lines)
