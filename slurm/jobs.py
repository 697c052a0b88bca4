"""The SLURM jobs of run folders, and their states, with or without accounting. Torch-free."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from moe.config import ConfigError
from slurm.config import Preparation
from trainer.settings.command import tells_mistakes
from trainer.settings.run_folder import read_frozen
from trainer.settings.typed import typed

ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STOPPED")


def slurm(*command: str) -> str:
    """The output of a SLURM command. Raises ConfigError with its message if it fails."""
    # a submission from inside another job must not inherit that job's layout
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    try:
        done = subprocess.run(command, env=inherited, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError([f"{command[0]} is not on the PATH; go to a login node of the cluster"]) from error
    if done.returncode:
        raise ConfigError([f"{command[0]} refuses: {done.stderr.strip() or done.stdout.strip()}"])
    return done.stdout


def preparation_of(run_dir: Path) -> Preparation | None:
    """What a job with job=prepare prepares; None for the folder of a training run."""
    cfg = read_frozen(run_dir / "config.yaml")
    return typed(Preparation, cfg) if "job" in cfg else None


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep, whose runs are numbered folders in it."""
    return (folder / "sweep.json").is_file()


def points_of(sweep: Path) -> list[list[str]]:
    """The overrides of each point of a sweep. Raises ConfigError for a damaged sweep.json."""
    path = sweep / "sweep.json"
    try:
        points = json.loads(path.read_text())
        if isinstance(points, list) and points and all(isinstance(point, list) for point in points):
            return points
        why = "it holds no lists of overrides"
    except (OSError, ValueError, RecursionError) as error:
        why = str(error)
    raise ConfigError(f"{path} cannot be read ({why}); restore it, or name a point of the sweep")


def runs_of(folder: Path) -> list[Path]:
    """The run folders of a sweep, or the run folder itself. Raises ConfigError if it is neither."""
    if is_sweep(folder):
        points = (path.parent for path in folder.glob("*/config.yaml") if path.parent.name.isdecimal())
        return sorted(points, key=lambda path: int(path.name))
    if (folder / "config.yaml").is_file():
        return [folder]
    raise ConfigError([f"{folder} is not a run folder or a sweep: it holds no config.yaml or sweep.json"])


def jobs_of(run_dir: Path) -> list[str]:
    """The SLURM jobs of a run, oldest first; a job of an array is `12_3`."""
    path = run_dir / "jobs"
    return path.read_text().split() if path.is_file() else []


def ask(run_dirs: list[Path]) -> dict[str, tuple[str, str]]:
    """{job: (state, nodes or reason)} of all jobs of the runs that SLURM still knows."""
    found: dict[str, tuple[str, str]] = {}
    for job in sorted({job.split("_")[0] for run_dir in run_dirs for job in jobs_of(run_dir)}):
        try:
            lines = slurm("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%R", "-j", job)
        except ConfigError as error:
            if "Invalid job id" not in str(error):
                raise
            try:  # an old job, which only accounting (if there is any) remembers
                lines = slurm("sacct", "-n", "-X", "-P", "-o", "JobID,State,NodeList", "-j", job)
            except ConfigError:
                continue
        for line in lines.splitlines():
            name, state, where = line.split("|")
            found[name] = (state.split()[0], where)  # "CANCELLED by 1000"
    return found


def active(run_dirs: list[Path]) -> dict[str, str]:
    """{job: state} of the jobs that are waiting, running or just ending."""
    return {job: state for job, (state, _) in ask(run_dirs).items() if state in ACTIVE}


def refuse_queued(run_dirs: list[Path]) -> None:
    """Raises ConfigError if a job of one of the runs is waiting or running."""
    queued = active(run_dirs)
    problems = [
        f"{run_dir} is in the queue as job {job} ({queued[job]}); use slurm.stop, or another name"
        for run_dir in run_dirs
        for job in jobs_of(run_dir)
        if job in queued
    ]
    if problems:
        raise ConfigError(problems)


def command(module: str, act: Callable[[Path], None]) -> NoReturn:
    """The entry point of `python -m slurm.<module> FOLDER`."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(f"usage: python -m slurm.{module} RUN_DIR|SWEEP", file=sys.stderr)
        sys.exit(2)
    sys.exit(tells_mistakes(act)(Path(sys.argv[1]).resolve()))
