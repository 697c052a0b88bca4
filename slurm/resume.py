"""`python -m slurm.resume RUN_DIR|SWEEP`: queue unfinished runs again. Torch-free."""

from pathlib import Path

from data_pipeline.claims import open_folder
from slurm.config import SlurmConfig
from slurm.jobs import command, is_sweep, preparation_of, refuse_queued, runs_of
from slurm.submit import queue
from trainer.settings.run_folder import read_frozen, read_state
from trainer.settings.typed import typed


def resume(folder: Path) -> None:
    """Queue a run, a point of a sweep, or all unfinished points."""
    run_dirs = [run_dir for run_dir in runs_of(folder) if read_state(run_dir)["state"] != "finished"]
    if not run_dirs:
        print("everything is finished")
        return
    refuse_queued(run_dirs)
    if (preparation := preparation_of(run_dirs[0])) is not None:
        open_folder(Path(preparation.data.dir))
    owner = folder.parent if is_sweep(folder.parent) else folder
    ids = queue(owner, run_dirs, typed(SlurmConfig, read_frozen(owner / "slurm.yaml")))
    print(f"queued as job {', '.join(ids)}")


if __name__ == "__main__":
    command("resume", resume)
