"""From validated runs to queued jobs: the job script, the frozen folders, sbatch. Torch-free."""

import json
import os
import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from data_pipeline.manifest import write_atomically
from moe.config import ConfigError
from slurm.config import SlurmConfig, SubmitConfig
from slurm.jobs import is_sweep, refuse_queued, runs_of, slurm
from slurm.snapshot import snapshot
from trainer.run_folder import freeze, lock


@dataclass
class Submission:
    """Runs that go to the cluster as one job, or as one job array."""

    folder: Path  # of the run, or of the sweep
    configs: list[SubmitConfig]
    frozen: list[DictConfig]  # what config.yaml of each run will hold
    overrides: list[list[str]]
    request: DictConfig  # the section slurm, the same for all
    sweep: bool

    @property
    def run_dirs(self) -> list[Path]:
        """One folder per run."""
        return [self.folder / str(i) for i in range(len(self.configs))] if self.sweep else [self.folder]

    def script(self) -> str:
        """The job script."""
        config, request = self.configs[0], self.configs[0].slurm
        ranks_per_node = config.parallel.nproc_per_node
        log = str(self.folder).replace("%", "%%") + ("/%a" if self.sweep else "") + "/logs/job.log"
        flags = {
            "job-name": str(Path(config.name).parent if self.sweep else config.name),
            "ntasks-per-node": str(ranks_per_node),
            **request.flags(),
            "output": log,
            "open-mode": "append",
            "signal": f"B:USR1@{request.stop_before_seconds}",
            ("requeue" if request.resume == "requeue" else "no-requeue"): None,
        }
        health = ["--gpus", request.gpus_per_node, "--min-free-gib", request.health.min_free_gib]
        health += ["--max-skew-seconds", request.health.max_skew_seconds]
        health += ["--seconds", request.health.seconds // 3]
        step, wrap = self._container()
        python = request.python or (sys.executable if request.container.kind == "none" else "python")
        values: dict[str, object] = {
            "RUN_DIR": self.folder,
            "CODE": self.folder / "code",
            "PYTHON": python,
            "RANKS_PER_NODE": ranks_per_node,
            "RESUME": request.resume,
            "MAX_RESTARTS": request.max_restarts,
            "EXCLUDE": request.exclude or "",
            "HEALTH_SECONDS": request.health.seconds,
            "HEALTH": health,
            "SRUN": step,
            "WRAP": wrap,
            "SETUP": request.setup,
        }
        lines = ["#!/usr/bin/env bash"]
        lines += [
            f"#SBATCH --{flag}" + ("" if value is None else f"={shlex.quote(value)}")
            for flag, value in flags.items()
        ]
        lines += [f"{key}={_quoted(value)}" for key, value in values.items()]
        lines += [f"export {key}={shlex.quote(value)}" for key, value in request.env.items()]
        return "\n".join([*lines, "", (Path(__file__).parent / "job.sh").read_text()])

    def _container(self) -> tuple[list[str], list[str]]:
        """Flags of srun and words before the rank command that put the ranks into the image."""
        container = self.configs[0].slurm.container
        needed = {str(self.folder)}
        for config in self.configs:
            needed |= {path for path in (config.data.dir, config.stage.init_from) if path is not None}
        mounts = [*(str(Path(path).resolve()) for path in sorted(needed)), *container.mounts]
        image, code = str(container.image), self.folder / "code"
        if container.kind == "pyxis":
            pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
            return [
                f"--container-image={image}",
                f"--container-mounts={pairs}",
                f"--container-workdir={code}",
            ], []
        if container.kind == "apptainer":
            gpus = ["--nv"] if self.configs[0].slurm.gpus_per_node else []
            binds = [f"--bind={mount}" for mount in mounts]
            return [], ["apptainer", "exec", *gpus, *binds, f"--pwd={code}", image]
        return [], []

    def submit(self) -> list[str]:
        """Freeze the folders and queue the job; returns its ids (several for a chain).

        Raises ConfigError, with nothing queued, for a folder that cannot be used and where sbatch refuses.
        """
        slurm("sbatch", "--version")
        self._refuse_other_folder()
        with ExitStack() as held:
            for run_dir in self.run_dirs:
                held.callback(os.close, lock(run_dir))
            refuse_queued(self.run_dirs)
            fresh = not any((run_dir / "jobs").exists() for run_dir in self.run_dirs)
            for run_dir, cfg, overrides in zip(self.run_dirs, self.frozen, self.overrides, strict=True):
                freeze(run_dir, cfg, overrides)
                (run_dir / "logs").mkdir(exist_ok=True)
            if fresh:  # a run goes on with the code that it began with
                snapshot(self.folder / "code")
            if self.sweep:
                write_atomically(self.folder / "sweep.json", json.dumps(self.overrides, indent=1).encode())
            (self.folder / "slurm.yaml").write_text(OmegaConf.to_yaml(self.request))
            (self.folder / "job.sh").write_text(self.script())
            return queue(self.folder, self.configs[0].slurm)

    def _refuse_other_folder(self) -> None:
        if not self.sweep and is_sweep(self.folder):
            raise ConfigError([f"{self.folder} is a sweep; choose another name"])
        if self.sweep and (self.folder / "config.yaml").exists():
            raise ConfigError([f"{self.folder} is a single run; choose another name for the sweep"])
        if self.sweep and is_sweep(self.folder):
            there = json.loads((self.folder / "sweep.json").read_text())
            if there != self.overrides:
                raise ConfigError(
                    [f"{self.folder} holds another sweep ({len(there)} points); choose another name"]
                )


def queue(folder: Path, request: SlurmConfig, points: list[Path] | None = None) -> list[str]:
    """sbatch the job script of a frozen run, or of `points` (default all) of a sweep; returns the job ids.

    Raises ConfigError where SLURM refuses; nothing stays queued then.
    """
    flags = []
    run_dirs = points or runs_of(folder)
    if is_sweep(folder):
        parallel = f"%{request.max_parallel}" if request.max_parallel else ""
        flags.append(f"--array={','.join(run_dir.name for run_dir in run_dirs)}{parallel}")
    ids: list[str] = []
    try:
        for _ in range(request.chain_length if request.resume == "chain" else 1):
            after = [f"--dependency=afterany:{ids[-1]}"] if ids else []
            answer = slurm("sbatch", "--parsable", *flags, *after, str(folder / "job.sh"))
            ids.append(answer.strip().split(";")[0])
    except ConfigError:
        if ids:
            slurm("scancel", *ids)
        raise
    for run_dir in run_dirs:
        with (run_dir / "jobs").open("a") as jobs:
            jobs.writelines(f"{job}_{run_dir.name}\n" if is_sweep(folder) else f"{job}\n" for job in ids)
    return ids


def _quoted(value: object) -> str:
    """A value of bash: a string, or an array for a list."""
    if isinstance(value, list):
        return f"({' '.join(shlex.quote(str(item)) for item in value)})"
    return shlex.quote(str(value))
