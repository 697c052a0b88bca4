"""How far a preparation is, as its folder tells it, for whoever looks on. Torch-free."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.claims import is_complete
from data_pipeline.documents import NOT_BAD
from data_pipeline.manifest import Manifest

SLICES = "survey/slices.json"  # bytes of input by the name of the slice
CONCLUSION = "survey/conclusion.json"  # documents, duplicates and rows left out, by source
_NEWEST = 200  # slices from whose times a rate is taken


@dataclass
class PreparationProgress:
    """Rates are those of the newest slices, by the times at which they appeared. None: not known yet."""

    phase: str  # plan | survey | prepare | done
    done: int  # slices of the phase
    slices: int | None
    tokens_per_second: float | None
    seconds_left: float | None  # in the phase
    rejects: int | None  # bad rows


def look(folder: Path) -> PreparationProgress:
    """Read how far the preparation of a folder is. Raises DataError for a damaged manifest."""
    with suppress(FileNotFoundError):  # it may be completed just now
        return _look(folder)
    return _look(folder)


def _look(folder: Path) -> PreparationProgress:
    if is_complete(folder):
        manifest = Manifest.load(folder)
        names = [name for name in os.listdir(folder / "slices") if name[0] != "."]
        rate, _ = _rates(folder / "slices", dict.fromkeys(names, 0))
        rejects = sum(_bad(source.skipped) for source in manifest.sources.values())
        return PreparationProgress("done", len(names), len(names), rate, 0.0, rejects)
    if not (folder / SLICES).exists():
        return PreparationProgress("plan", 0, None, None, None, None)
    slices = json.loads((folder / SLICES).read_bytes())
    concluded = (folder / CONCLUSION).exists()
    results = folder / ("slices" if concluded else "survey")
    done = _finished(results, slices)
    if concluded:
        counts = json.loads((folder / CONCLUSION).read_bytes()).values()
    else:
        counts = [json.loads((results / name / "record.json").read_bytes()) for name in done]
    rejects = sum(_bad(of["skipped"]) for of in counts)
    tokens, bytes_per_second = _rates(results, slices)
    left = sum(size for name, size in slices.items() if name not in done)
    seconds = left / bytes_per_second if bytes_per_second else None
    phase = "prepare" if concluded else "survey"
    return PreparationProgress(phase, len(done), len(slices), tokens, seconds, rejects)


def _finished(results: Path, slices: dict[str, int]) -> set[str]:
    return slices.keys() & set(os.listdir(results)) if results.is_dir() else set()


def _bad(skipped: dict[str, int]) -> int:
    return sum(count for code, count in skipped.items() if code not in (*NOT_BAD, "duplicate"))


def _rates(results: Path, slices: dict[str, int]) -> tuple[float | None, float | None]:
    """(tokens, bytes of input) per second of the newest slices."""
    finished = _finished(results, slices)
    newest = sorted((os.stat(results / name).st_mtime, name) for name in finished)[-_NEWEST:]
    seconds = newest[-1][0] - newest[0][0] if newest else 0.0
    if seconds <= 0:
        return None, None
    names = [name for _, name in newest[1:]]  # the first one took its time before
    tokens = sum(_tokens(results / name) for name in names) if results.name == "slices" else None
    per_second = tokens / seconds if tokens is not None else None
    return per_second, sum(slices[name] for name in names) / seconds


def _tokens(slice: Path) -> int:
    shards: dict[str, Any] = json.loads((slice / "slice.json").read_bytes())
    return sum(shard["tokens"] for of_split in shards.values() for shard in of_split)
