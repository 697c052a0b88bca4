"""From text to token shards: cut the sources into slices, survey and write every slice, write the manifest.

After a kill, run the same command again: finished slices are kept, and the result is the same, byte for
byte, for any number of workers.
"""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from data_pipeline.config import DataConfig, DataError
from data_pipeline.documents import Document, check_columns, find_duplicates
from data_pipeline.manifest import (
    FORMAT,
    SPLITS,
    InputFile,
    Manifest,
    SourceRecord,
    TokenizerRecord,
    replace_synced,
    sha256_of,
    shards_from_json,
    write_atomically,
)
from data_pipeline.readers import BLANK, list_inputs, plan_slices, read_rows
from data_pipeline.slices import SliceJob, start_worker, survey_slice, write_slice
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
_MOST_KEYS = 100  # of messages, that the manifest names as not used

Jobs = dict[str, list[SliceJob]]  # by source
Act = Callable[[SliceJob], int]  # returns how many units it made


def prepare(config: DataConfig, vocab_size: int, seed: int) -> Manifest:
    """Prepare `config.dir` for models of `vocab_size` ids; work that is already done is kept.

    The seed chooses which documents are held out for validation. Raises DataError for inputs that cannot be
    read, a tokenizer that is too large, and a folder with a different preparation (which stays as it is).
    """
    given = None if config.tokenizer is None else fetch_tokenizer(config.tokenizer)
    size = given.vocab_size if given else config.tokenizer_vocab_size
    assert size is not None
    check_vocab_size(size, vocab_size)
    folder = Path(config.dir)
    folder.mkdir(parents=True, exist_ok=True)
    # spawn, because a fork would copy the state of the tokenizer's threads at a random moment
    spawn, number = multiprocessing.get_context("spawn"), config.num_workers
    pool = ProcessPoolExecutor(number, spawn, initializer=start_worker) if number > 1 else None
    with _only_one(folder), pool or contextlib.nullcontext() as workers:
        plan = _agree_on_plan(config, seed, given, folder)
        if (folder / "manifest.json").exists():
            manifest, outcome = Manifest.load(folder), "already prepared"
        else:
            _clean(folder)
            jobs = {name: _jobs(name, config, plan.inputs[name], seed) for name in sorted(plan.inputs)}
            plan.save(folder, "plan.json")  # not before: a source that cannot be read must not fix the rest
            if not (folder / "tokenizer.json").exists():  # an earlier attempt may have written it
                text = given.serialized if given else train_tokenizer(_training_texts(jobs), size)
                write_atomically(folder / "tokenizer.json", text.encode())
            to_do = [job for of in jobs.values() for job in of if not job.survey.is_dir()]
            _run(workers, survey_slice, "survey", "documents", jobs, to_do)
            sources = _conclude_survey(jobs, config, folder)
            to_do = [job for of in jobs.values() for job in of if not job.target.is_dir()]
            _run(workers, write_slice, "prepare", "tokens", jobs, to_do)
            _clean(folder)
            manifest, outcome = _commit(plan, jobs, sources, folder), "prepared"
        shutil.rmtree(folder / "survey", ignore_errors=True)
        (folder / "plan.json").unlink(missing_ok=True)
    print(f"{outcome}: {folder}\n{_summary(manifest)}", flush=True)
    return manifest


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Lock the folder against a second preparation until this process ends, even by a kill."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"data.dir={folder} is being prepared by another process; wait for it") from error
        except OSError:
            pass  # a file system without locks: a second run may fail or waste work, but damages nothing
        yield
    except OSError as error:  # such as a full disk, or an input without read permission
        raise DataError(f"data.dir={folder}: {error}; fix this and run again to go on") from error
    except BrokenProcessPool as error:
        what = "a worker was killed, perhaps for lack of memory; run again to go on, with a smaller"
        raise DataError(f"{what} data.num_workers if it happens again") from error
    finally:
        os.close(descriptor)


def _clean(folder: Path) -> None:
    """Remove the incomplete files and folders of killed workers."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)
    for path in [*(folder / "slices").glob(".*"), *(folder / "survey").glob(".*")]:
        removed = path.with_name(f".{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):  # a dying worker may still write there, or has just finished it
            path.rename(removed)  # first, so that no worker can complete a half-removed folder
            shutil.rmtree(removed)


def _agree_on_plan(config: DataConfig, seed: int, given: Tokenizer | None, folder: Path) -> Manifest:
    """The plan of this preparation. Raises DataError if the folder holds other files or a different plan."""
    names = [name for name in ("manifest.json", "plan.json") if (folder / name).exists()]
    recorded = Manifest.load(folder, names[0]) if names else None
    known = {file.path: file for files in recorded.inputs.values() for file in files} if recorded else {}
    if recorded is None and any(not entry.name.endswith(".partial") for entry in folder.iterdir()):
        raise DataError(f"data.dir={folder} holds other files; name a new or an empty folder")
    inputs = {name: list_inputs(name, source, known) for name, source in config.sources.items()}
    described = {}  # the inputs of each source, without their paths
    for name, files in inputs.items():
        digest = _sha256("".join(file.sha256 or str(file.mtime_ns) for file in files))[:12]
        size = sum(file.bytes for file in files)
        described[f"data.sources.{name}.paths"] = f"{len(files)} files of {size} bytes (sha256 {digest})"
    settings = {
        **config.content_settings(),
        "data.tokenizer": f"sha256 {_sha256(given.serialized)}" if given else None,
        "data.on_bad_row": "quarantine" if config.on_bad_row == "quarantine" else "skip or error",
        "data.slice_bytes": config.slice_bytes,
        "data.shard_bytes": config.shard_bytes,
        "seed": seed,
        **described,
    }
    plan = Manifest(FORMAT, settings, inputs, TokenizerRecord("", 0, 0), {}, "")
    if recorded is not None:
        recorded.check_settings(settings, folder)
    return plan


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _jobs(name: str, config: DataConfig, inputs: list[InputFile], seed: int) -> list[SliceJob]:
    source = config.sources[name]
    slices = plan_slices(source, inputs, config.slice_bytes)
    if not slices:
        files = ", ".join(file.path for file in inputs)
        raise DataError(f"data.sources.{name}.paths: no content in {files}; name files with text")
    check_columns(name, source, (row for part in slices[0] for row in read_rows(source, part)))
    return [SliceJob(f"{name}-{i:05d}", name, parts, config, seed) for i, parts in enumerate(slices)]


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


def _run(pool: Executor | None, act: Act, title: str, unit: str, jobs: Jobs, to_do: list[SliceJob]) -> None:
    """Apply `act` to the jobs that are not done yet. Shows a bar on a terminal, and prints a line every ten
    seconds elsewhere; the rate is in `unit` per second of this attempt."""
    units, started = 0, time.monotonic()
    total, last_line = sum(job.bytes for of_source in jobs.values() for job in of_source), started
    columns = TextColumn(title), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}")
    with Progress(*columns, TimeRemainingColumn(), disable=not sys.stdout.isatty()) as progress:
        before = total - sum(job.bytes for job in to_do)
        bar = progress.add_task(title, total=total, completed=before, rate="")
        made = pool.map(act, to_do) if pool else map(act, to_do)
        for job, more in zip(to_do, made, strict=True):
            now, units = time.monotonic(), units + more
            rate = f"{units / max(now - started, 1e-9):,.0f} {unit}/s"
            progress.update(bar, advance=job.bytes, rate=rate)
            if progress.disable and now - last_line >= _SECONDS_BETWEEN_LINES:
                last_line, [task] = now, progress.tasks
                left = (task.remaining or 0) * (now - started) / max(task.completed - before, 1)
                print(f"{title}: {task.percentage:.0f}%, {rate}, {left:,.0f} s left", flush=True)


def _conclude_survey(jobs: Jobs, config: DataConfig, folder: Path) -> dict[str, SourceRecord]:
    """Write rejects.jsonl, the bad rows of all sources in order, with line numbers from the start of each
    file; find the duplicates, and write the numbers of those in each slice to its repeats.npy. Returns the
    record of each source, without shards: the rows and the keys of messages that it leaves out. Raises
    DataError for sources with too many bad rows or without a document."""
    found, broken = {}, []
    partial = folder / ".rejects.jsonl.partial"
    with open(partial, "w") as rejects:
        for name, of_source in jobs.items():
            skipped, ignored, lines_before = Counter[str](), Counter[str](), Counter[str]()
            firsts, documents = [], 0
            for job in of_source:
                record = json.loads((job.survey / "record.json").read_bytes())
                firsts.append(documents)
                documents += record["documents"]
                skipped.update(record["skipped"])
                ignored.update(record.get("ignored", {}))  # missing in a survey of an earlier version
                with open(job.survey / "rejects.jsonl") as of_slice:
                    for fields in map(json.loads, of_slice):
                        fields["line"] += lines_before[fields["file"]]
                        rejects.write(json.dumps(fields) + "\n")
                lines_before.update(record["lines"])
            bad = skipped.total() - skipped[BLANK]
            law = None
            if not documents:
                law = "the source has no document"
            elif bad > config.max_bad_fraction * (bad + documents):
                law = f"more than data.max_bad_fraction={config.max_bad_fraction} allows"
            elif bad and config.on_bad_row == "error":  # surveyed by an attempt with another on_bad_row
                law = "data.on_bad_row=error allows none"
            if law is not None:
                reasons = ", ".join(f"{count} {code}" for code, count in skipped.most_common()) or "no rows"
                broken.append(
                    f"data.sources.{name}: {bad} of {bad + documents} rows are bad ({reasons}), {law};"
                    f" fix the files or the source: {folder}/rejects.jsonl lists the bad rows"
                )
            # the files of hashes are empty without data.deduplicate
            repeats = find_duplicates([job.survey / "hashes" for job in of_source])
            of_slices = np.split(repeats, np.searchsorted(repeats, firsts[1:]))
            for job, first, of_job in zip(of_source, firsts, of_slices, strict=True):
                np.save(job.survey / "repeats.npy", of_job - first)
            left_out, keys = skipped + Counter(duplicate=len(repeats)), ignored.most_common(_MOST_KEYS)
            found[name] = SourceRecord({split: [] for split in SPLITS}, dict(left_out), None, dict(keys))
    replace_synced(partial, folder / "rejects.jsonl")
    if broken:
        raise DataError("\n".join(broken))
    return found


def _commit(plan: Manifest, jobs: Jobs, sources: dict[str, SourceRecord], folder: Path) -> Manifest:
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
    manifest = replace(plan, tokenizer=TokenizerRecord(*identity), sources=sources, rejects_sha256=digest)
    manifest.save(folder)
    return manifest


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
            keys = ", ".join(f"{key!r} in {count:,}" for key, count in source.ignored.items())
            lines.append(f"  {name}: keys of messages that are not used, and in how many documents: {keys}")
    return "\n".join(lines)
