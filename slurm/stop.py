"""`python -m slurm.stop RUN_DIR|SWEEP`: running jobs save and end, waiting jobs are cancelled. Torch-free."""

from pathlib import Path

from moe.config import ConfigError
from slurm.jobs import active, command, runs_of, slurm


def stop(folder: Path) -> None:
    """Ask every job to end; no job continues these runs until `slurm.resume`."""
    run_dirs = runs_of(folder)
    for run_dir in run_dirs:
        (run_dir / "stop").write_text("stopped by slurm.stop\n")
    jobs = active(run_dirs)
    problems = []
    for job, state in jobs.items():
        try:
            slurm("scancel", *(["--batch", "--signal=USR1"] if state == "RUNNING" else []), job)
            print(f"job {job}: {'saves and ends' if state == 'RUNNING' else 'taken from the queue'}")
        except ConfigError as error:  # the job may have just ended; stop the others nevertheless
            problems.append(f"job {job}: {error}")
    if not jobs:
        print("no job is waiting or running")
    if problems:
        raise ConfigError(problems)


if __name__ == "__main__":
    command("stop", stop)
