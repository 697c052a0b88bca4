"""`python -m slurm.stop RUN_DIR|SWEEP`: running jobs save and end, waiting ones go. Torch-free."""

from pathlib import Path

from slurm.jobs import active, command, runs_of, slurm


def stop(folder: Path) -> None:
    """Ask for the end of every job; none of them goes on until `slurm.resume`."""
    run_dirs = runs_of(folder)
    for run_dir in run_dirs:
        (run_dir / "stop").write_text("stopped by slurm.stop\n")
    jobs = active(run_dirs)
    for job, state in jobs.items():
        slurm("scancel", *(["--batch", "--signal=USR1"] if state == "RUNNING" else []), job)
        print(f"job {job}: {'saves and ends' if state == 'RUNNING' else 'taken from the queue'}")
    if not jobs:
        print("no job waits or runs")


if __name__ == "__main__":
    command("stop", stop)
