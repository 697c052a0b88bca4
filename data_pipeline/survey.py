"""The first look at all rows, before any is encoded: bad ones are listed, equal documents are found.

survey/<source>-00000/      of a slice; the survey is removed when the manifest is written
    record.json rejects.jsonl hashes
survey/<source>.npy         numbers of the source's documents that are equal to an earlier one
rejects.jsonl               the bad rows of all sources, in order
"""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from data_pipeline.config import DataConfig, DataError
from data_pipeline.documents import Document
from data_pipeline.duplicates import find_duplicates, hash_document
from data_pipeline.manifest import sync_folder, to_json
from data_pipeline.readers import BLANK
from data_pipeline.slices import SliceJob, complete_folder, judged, write_synced

DUPLICATE = "duplicate"
_NOT_BAD = (BLANK, DUPLICATE)  # left out, but nothing is lost


@dataclass
class SurveyRecord:
    """What a slice holds. skipped: rows by the code of the reason; lines: how many begin in it, by file."""

    documents: int
    skipped: dict[str, int]
    lines: dict[str, int]

    @staticmethod
    def load(job: SliceJob) -> "SurveyRecord":
        """Read back what `survey_slice` wrote."""
        return SurveyRecord(**json.loads((job.survey / "record.json").read_bytes()))


def bad_rows(skipped: dict[str, int]) -> int:
    """How many of the rows that were left out are lost."""
    return sum(count for code, count in skipped.items() if code not in _NOT_BAD)


def survey_slice(job: SliceJob) -> int:
    """Survey a slice; returns its number of documents.

    Raises DataError for an input that cannot be read and, with on_bad_row=error, for a bad row.
    """
    config = job.config
    documents, skipped, lines, hashes = 0, Counter[str](), {}, bytearray()
    with complete_folder(job.survey) as folder, open(folder / "rejects.jsonl", "w") as rejects:
        for item in judged(job):
            lines[item.part.path] = item.row.line
            if isinstance(item, Document):
                documents += 1
                if config.deduplicate:
                    hashes += hash_document(item.data)
                continue
            skipped[item.code] += 1
            if item.code in _NOT_BAD:
                continue
            if config.on_bad_row == "error":
                raise DataError(
                    f"{item.part.path}: the row at {item.row.offset} is bad ({item.reason}): {item.head()!r};"
                    " mend it, or set data.on_bad_row to skip or quarantine"
                )
            fields = {"source": job.source, "file": item.part.path, "line": item.row.line}
            fields |= {"offset": item.row.offset, "reason": item.reason, "head": item.head()}
            if config.on_bad_row == "quarantine":
                fields["row"] = item.head(None)
            rejects.write(json.dumps(fields) + "\n")
        write_synced(folder / "hashes", bytes(hashes))
        write_synced(folder / "record.json", to_json(asdict(SurveyRecord(documents, dict(skipped), lines))))
    return documents


def conclude(jobs: dict[str, list[SliceJob]], config: DataConfig, folder: Path) -> dict[str, Counter[str]]:
    """Write rejects.jsonl and find the duplicates, from finished surveys of all slices; every job learns the
    number of its first document.

    Returns the rows that each source leaves out, by the code of the reason. Raises DataError for sources
    with too many bad rows or without a document.
    """
    found, broken = {}, []
    partial = folder / ".rejects.jsonl.partial"
    with open(partial, "w") as rejects:
        for name, of_source in jobs.items():
            skipped, documents = _gather(of_source, rejects)
            if config.deduplicate:
                duplicates = find_duplicates([job.survey / "hashes" for job in of_source])
                skipped[DUPLICATE] = len(duplicates)
                np.save(of_source[0].duplicates, duplicates)
            found[name] = +skipped
            broken += _broken(name, found[name], documents, config, folder)
        rejects.flush()
        os.fsync(rejects.fileno())
    os.replace(partial, folder / "rejects.jsonl")
    sync_folder(folder)
    if broken:
        raise DataError("\n".join(broken))
    return found


def _broken(name: str, skipped: Counter[str], documents: int, config: DataConfig, folder: Path) -> list[str]:
    """What is wrong with a source as a whole."""
    bad, rows = bad_rows(skipped), bad_rows(skipped) + documents
    if documents and bad <= config.max_bad_fraction * rows:
        return []
    reasons = ", ".join(f"{count} {code}" for code, count in skipped.most_common()) or "no rows"
    what = "" if documents else "no document; "
    start = f"data.sources.{name}: {what}{bad} of {rows} rows are bad ({reasons}),"
    law = f" more than data.max_bad_fraction={config.max_bad_fraction} allows," if documents else ""
    return [f"{start}{law} they are listed in {folder}/rejects.jsonl; mend the files or the source"]


def _gather(jobs: list[SliceJob], rejects: TextIO) -> tuple[Counter[str], int]:
    """Append a source's rejects, with lines counted from the start of the file; what it skips, documents."""
    skipped, documents, lines_before = Counter[str](), 0, Counter[str]()
    for job in jobs:
        record = SurveyRecord.load(job)
        job.first_document = documents
        documents += record.documents
        skipped.update(record.skipped)
        with open(job.survey / "rejects.jsonl") as of_slice:
            for text in of_slice:
                fields = json.loads(text)
                fields["line"] += lines_before[fields["file"]]
                rejects.write(json.dumps(fields) + "\n")
        lines_before.update(record.lines)
    return skipped, documents
