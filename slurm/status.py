"""`python -m slurm.status RUN_DIR|SWEEP`: where each run is, with and without accounting. Torch-free."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from slurm.jobs import ACTIVE, ask, command, is_sweep, jobs_of, runs_of
from trainer.config import RunConfig
from trainer.run_folder import read_state


def state_of(run_dir: Path, answers: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """(state, job) of a run: what SLURM says of a job that waits or runs, else what the folder says."""
    jobs = jobs_of(run_dir)
    live = [job for job in jobs if job in answers and answers[job][0] in ACTIVE]
    state, attempt = read_state(run_dir)["state"], read_state(run_dir)["attempt"]
    if live:
        name, where = answers[live[0]]
        again = f", attempt {attempt + 1}" if attempt and name == "PENDING" else ""
        return f"{name.lower()} {where if name == 'PENDING' else ''}".strip() + again, live[0]
    stop = run_dir / "stop"
    last = jobs[-1] if jobs else "-"
    if state == "finished":
        return state, last
    if stop.is_file():
        return stop.read_text().strip(), last
    if state in ("running", "new") and last in answers:  # no rank could say how it ended
        return answers[last][0].lower(), last
    return "lost: its job is gone" if state == "running" else state, last


def last_metrics(run_dir: Path) -> dict[str, Any]:
    """The newest logged training step."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            metrics = json.loads(line)
        except ValueError:  # torn, or cut by the seek
            continue
        if "loss" in metrics:
            return metrics
    return {}


def show(folder: Path) -> None:
    """Print one line per run."""
    run_dirs = runs_of(folder)
    answers = ask(run_dirs)
    points = json.loads((folder / "sweep.json").read_text()) if is_sweep(folder) else [[]]
    shared = set(points[0]).intersection(*points) if len(points) > 1 else set()
    table = Table("run", "state", "job", "attempt", "step", "loss", "tokens/s", "overrides", box=None)
    for run_dir, overrides in zip(run_dirs, points, strict=True):
        state, job = state_of(run_dir, answers)
        metrics = last_metrics(run_dir)
        steps = f"{metrics.get('step', 0)}/{RunConfig.of_run(run_dir).stage.total_steps}"
        loss = f"{metrics['loss']:.4f}" if metrics else "-"
        speed = f"{metrics['tokens_per_second']:,.0f}" if metrics else "-"
        own = " ".join(override for override in overrides if override not in shared)
        attempt = str(read_state(run_dir)["attempt"])
        table.add_row(run_dir.name, state, job, attempt, steps, loss, speed, own)
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    command("status", show)
