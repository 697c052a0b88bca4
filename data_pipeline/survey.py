"""The first reading of all slices: bad rows, duplicates, and what else is left out; survey/ holds it."""

import hashlib
import io
import json
import uuid
from collections import Counter
from pathlib import Path

import numpy as np

from data_pipeline.config import CHAT_KINDS, DataConfig, DataError
from data_pipeline.documents import KEYS, NOT_BAD, Document, find_duplicates, keys_of
from data_pipeline.manifest import SPLITS, SourceRecord, replace_synced, to_json, write_atomically
from data_pipeline.progress import CONCLUSION
from data_pipeline.readers import BLANK
from data_pipeline.slices import SliceJob, complete_folder
from data_pipeline.tokenizer import load_tokenizer

_MOST_KEYS = 100  # of messages, that the manifest names as not used


def survey_slice(job: SliceJob) -> int:
    """List the bad rows of a slice and hash its documents; returns their number. record.json holds this
    number, the number of rows left out by code of the reason, the number of documents by key of messages that
    is not used, and the number of lines that begin in the slice by file. Raises DataError for an input that
    cannot be read and, with on_bad_row=error, for a bad row."""
    documents, skipped, ignored, lines = 0, Counter[str](), Counter[str](), {}
    digest, hashes = hashlib.sha256(), [bytearray() for _ in range(KEYS[job.config.deduplicate])]
    is_limited = job.config.max_chat_tokens is not None and job.config.sources[job.source].kind in CHAT_KINDS
    tokenizer = load_tokenizer(job.config.dir) if is_limited else None
    with complete_folder(job.survey) as folder, open(folder / "rejects.jsonl", "w") as rejects:
        for item in job.items(tokenizer):
            path = item.row.part.path
            lines[path] = item.row.line
            if isinstance(item, Document):
                documents += 1
                ignored.update(item.ignored)
                digest.update(item.data)
                # a conversation has one key at most
                for held, key in zip(hashes, keys_of(item, job.config.deduplicate), strict=False):
                    held += key
                continue
            skipped[item.code] += 1
            if item.code == BLANK:
                continue
            if job.config.on_bad_row == "error" and item.code not in NOT_BAD:
                raise item.error()
            fields = {"source": job.source, "file": path, "line": item.row.line}
            fields |= {"offset": item.row.offset, "reason": item.reason, "head": item.head()}
            if job.config.on_bad_row == "quarantine":
                fields["row"] = item.head(None)
            rejects.write(json.dumps(fields) + "\n")
        for number, held in enumerate(hashes):
            (folder / f"hashes-{number:02d}").write_bytes(held)
        record = {"documents": documents, "skipped": skipped, "ignored": ignored, "lines": lines}
        record["sha256"] = digest.hexdigest()
        (folder / "record.json").write_bytes(to_json(record))
    return documents


def conclude_survey(jobs: dict[str, list[SliceJob]], folder: Path) -> None:
    """Write rejects.jsonl, the bad rows of all sources in order, with line numbers from the start of each
    file; find the duplicates, and write the numbers of those in each slice to its repeats.npy. CONCLUSION
    counts the documents of each source, the rows that it leaves out by the code of the reason, and the
    documents by key of messages that is not used."""
    found = {}
    unfinished = folder / f".rejects.jsonl.{uuid.uuid4().hex}.partial"
    with open(unfinished, "w") as rejects:
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
            files = [sorted(job.survey.glob("hashes-*")) for job in of_source]  # by key; none without keys
            alike = [find_duplicates(list(of_key)) for of_key in zip(*files, strict=True)]
            repeats = np.unique(np.concatenate(alike)) if alike else np.empty(0, np.int64)
            of_slices = np.split(repeats, np.searchsorted(repeats, firsts[1:]))
            for job, first, of_job in zip(of_source, firsts, of_slices, strict=True):
                numbers = io.BytesIO()
                np.save(numbers, of_job - first)
                write_atomically(job.survey / "repeats.npy", numbers.getvalue())
            left_out = {"skipped": skipped, "duplicates": len(repeats)}
            found[name] = {"documents": documents, **left_out, "ignored": ignored}
    replace_synced(unfinished, folder / "rejects.jsonl")
    write_atomically(folder / CONCLUSION, to_json(found))


def _first_reject(folder: str, name: str) -> str:
    """The first row that a source leaves out, with the reason; nothing if it lists none."""
    with open(Path(folder, "rejects.jsonl")) as rejects:
        first = next((fields for fields in map(json.loads, rejects) if fields["source"] == name), None)
    return "" if first is None else f", first {first['file']} line {first['line']}: {first['reason']}"


def check_survey(config: DataConfig) -> dict[str, SourceRecord]:
    """The record of each source, without shards: the rows and the keys of messages that it leaves out. Raises
    DataError for sources with too many bad rows or without a document."""
    found, broken = {}, []
    for name, counts in json.loads(Path(config.dir, CONCLUSION).read_bytes()).items():
        documents, skipped = counts["documents"], Counter[str](counts["skipped"])
        bad = skipped.total() - sum(skipped[code] for code in NOT_BAD)
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
                f" fix the files or the source, and name a new data.dir: {config.dir}/rejects.jsonl lists the"
                f" rows{_first_reject(config.dir, name)}"
            )
        left_out = skipped + Counter(duplicate=counts["duplicates"])
        keys = Counter[str](counts["ignored"]).most_common(_MOST_KEYS)
        found[name] = SourceRecord({split: [] for split in SPLITS}, dict(left_out), None, dict(keys))
    if broken:
        raise DataError("\n".join(broken))
    return found
