"""`python -m slurm.status RUN_DIR|SWEEP`: the state of each run, with or without accounting. Torch-free."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline.progress import look
from slurm.config import Preparation
from slurm.jobs import ACTIVE, ask, command, is_sweep, jobs_of, points_of, preparation_of, runs_of
from trainer.settings.config import RunConfig
from trainer.settings.run_folder import read_state


def state_of(run_dir: Path, state: dict[str, Any], answers: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """(state, job) of a run: SLURM's state of a waiting or running job, else the folder's."""
    jobs, stop = jobs_of(run_dir) or ["-"], run_dir / "stop"
    for job in jobs:
        name, where = answers.get(job, ("", ""))
        if name in ACTIVE:
            return f"{name.lower()} {where}", job
    said = state["state"]
    if said != "finished" and stop.is_file():
        said = stop.read_text().strip()
    elif said in ("running", "new"):  # no rank recorded the end of the run
        said = answers.get(jobs[-1], ("lost: its job is gone", ""))[0].lower()
    return said, jobs[-1]


def last_metrics(run_dir: Path) -> dict[str, Any]:
    """The metrics of the newest logged training step, {} before the first."""
    path = run_dir / "metrics.jsonl"
    if path.is_file():
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))
            for line in reversed(file.read().splitlines()):
                if b'"loss":' in line and line[:1] == b"{" and line[-1:] == b"}":  # a complete line
                    with suppress(ValueError, RecursionError):
                        return json.loads(line)
    return {}


def show(folder: Path) -> None:
    """Print one line per run."""
    run_dirs = runs_of(folder)
    answers = ask(run_dirs)
    if (preparation := preparation_of(run_dirs[0])) is not None:
        _print_table(_rows_of_preparation(run_dirs[0], preparation, answers))
        return
    points = points_of(folder) if is_sweep(folder) else [[]]
    shared = set(points[0]).intersection(*points) if len(points) > 1 else set()
    rows = [["run", "state", "job", "attempt", "step", "loss", "tokens/s", "overrides"]]
    for run_dir, overrides in zip(run_dirs, points, strict=True):
        state, metrics = read_state(run_dir), last_metrics(run_dir)
        said, job = state_of(run_dir, state, answers)
        steps = f"{metrics.get('step', 0)}/{RunConfig.of_run(run_dir).stage.total_steps}"
        numbers = ["-", "-"]
        if metrics:
            numbers = [f"{metrics['loss']:.4f}", f"{metrics['tokens_per_second']:,.0f}"]
        own = " ".join(override for override in overrides if override not in shared)
        rows.append([run_dir.name, said, job, str(state["attempt"]), steps, *numbers, own])
    _print_table(rows)


def _rows_of_preparation(
    run_dir: Path, preparation: Preparation, answers: dict[str, tuple[str, str]]
) -> list[list[str]]:
    state, seen = read_state(run_dir), look(Path(preparation.data.dir))
    said, job = state_of(run_dir, state, answers)
    rate = "-" if seen.tokens_per_second is None else f"{seen.tokens_per_second:,.0f}"
    left = "-" if seen.seconds_left is None else f"{seen.seconds_left:,.0f}"
    slices = f"{seen.done}/{'-' if seen.slices is None else seen.slices}"
    rejects = "-" if seen.rejects is None else f"{seen.rejects:,}"
    head = ["run", "state", "job", "attempt", "phase", "slices", "tokens/s", "seconds left", "rejects"]
    return [head, [run_dir.name, said, job, str(state["attempt"]), seen.phase, slices, rate, left, rejects]]


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    command("status", show)
