"""The settings of a submission: a run and its request to the cluster. Torch-free, for login nodes."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from data_pipeline.config import DataConfig
from moe.config import ConfigError
from trainer.settings.config import RunConfig
from trainer.settings.secrets import is_secret_name
from trainer.settings.typed import AtLeast0, AtLeast1, value_problems


@dataclass
class HealthConfig:
    """Limits of the health check of the nodes before training."""

    seconds: AtLeast0
    min_free_gib: float
    max_skew_seconds: float


@dataclass
class ContainerConfig:
    """The container in which the ranks run."""

    kind: str
    image: str | None
    mounts: list[str]
    start_seconds: AtLeast0


@dataclass
class SlurmConfig:
    """What the job requests, and how it continues after an interruption. The values are in conf/slurm/."""

    nodes: AtLeast1
    gpus_per_node: AtLeast0
    cpus_per_task: int | None
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    reservation: str | None
    time: str | None
    mem: str | None
    exclude: str | None
    nodelist: str | None
    exclusive: bool
    switches: str | None
    sbatch: dict[str, Any]
    max_parallel: AtLeast0
    resume: str
    chain_length: AtLeast1
    max_restarts: AtLeast0
    stop_before_seconds: AtLeast1
    health: HealthConfig
    container: ContainerConfig
    python: str | None
    setup: list[str]
    env: dict[str, str]
    dry_run: bool

    def flags(self) -> dict[str, str | None]:
        """sbatch's long flags and their values (None for a switch); keys of `sbatch` replace the others."""
        given: dict[str, Any] = {key: getattr(self, key) or None for key in _FLAGS} | self.sbatch
        return {
            str(key).replace("_", "-"): None if value is True else str(value)
            for key, value in given.items()
            if value is not None and value is not False
        }

    def problems(self) -> list[str]:
        """Every broken rule that the types of single values do not express, one line each."""
        found = []
        if self.resume not in ("requeue", "chain"):
            found.append(f"slurm.resume={self.resume} is unknown; use requeue or chain")
        if (kind := self.container.kind) not in ("none", "pyxis", "apptainer"):
            found.append(f"slurm.container.kind={kind} is unknown; use none, pyxis or apptainer")
        elif kind != "none" and self.container.image is None:
            found.append(f"slurm.container.kind={kind} needs slurm.container.image=...")
        for flag, value in self.flags().items():
            if flag in _OURS:
                found.append(f"slurm.sbatch.{flag} is set by {_OURS[flag]}; remove it")
            elif not re.fullmatch(r"[a-z][a-z0-9-]+", flag) or not (value or "").isprintable():
                found.append(
                    f"slurm: --{flag}={value!r} must be a long flag of sbatch with a value of one line"
                )
        for key in self.env:
            if not re.fullmatch(r"[A-Za-z_]\w*", key, re.ASCII):
                law = "is not the name of an environment variable; use letters, digits and _"
                found.append(f"slurm.env.{key} {law}")
            elif key in _OF_THE_SCRIPT or key.startswith("BASH"):
                found.append(f"slurm.env.{key} is a variable of the job script or of bash; use another name")
            elif is_secret_name(key):
                remedy = "keep it out of the job script: export it in the shell that submits"
                found.append(f"slurm.env.{key} looks like a secret; {remedy}")
        return found

    def gpu_problems(self, nproc_per_node: int, device: str) -> list[str]:
        """Why the request does not fit `nproc_per_node` ranks per node on `device`, one line each."""
        found = []
        if (gpus := self.gpus_per_node) not in (0, nproc_per_node):
            different = f"slurm.gpus_per_node={gpus} but parallel.nproc_per_node={nproc_per_node}"
            found.append(f"{different}: a rank is one GPU; give both the same number")
        if device == "cuda" and gpus == 0:
            remedy = f"slurm.gpus_per_node={nproc_per_node}, or device=cpu"
            found.append(f"slurm.gpus_per_node=0 but device=cuda: no node would give a GPU; use {remedy}")
        if device == "cpu" and gpus > 0:
            different = f"slurm.gpus_per_node={gpus} but device=cpu"
            found.append(f"{different}: the GPUs would be idle; use slurm.gpus_per_node=0, or device=auto")
        return found


# Keys that are flags of sbatch under their own names.
_FLAGS = (
    *("nodes", "gpus_per_node", "cpus_per_task", "partition", "account", "qos", "constraint", "reservation"),
    *("time", "mem", "exclude", "nodelist", "exclusive", "switches"),
)
# Flags that the job script relies on, and what sets them.
_OURS = {
    **dict.fromkeys(("job-name", "output", "error", "open-mode", "chdir"), "name and output_dir"),
    **dict.fromkeys(
        ("ntasks", "ntasks-per-node"),
        "slurm.nodes and parallel.nproc_per_node (data.num_workers, with job=prepare)",
    ),
    **dict.fromkeys(("requeue", "no-requeue", "dependency"), "slurm.resume"),
    **dict.fromkeys(("array", "wrap", "parsable", "test-only"), "python -m slurm"),
    "signal": "slurm.stop_before_seconds",
}
# Variables that slurm/script.py and slurm/job.sh set, or that bash keeps for itself.
_OF_THE_SCRIPT = {
    *(
        "MODULE",
        "ATTEMPT",
        "DATA_DIR",
        "RUN_DIR",
        "CODE",
        "PYTHON",
        "RANKS_PER_NODE",
        "RESUME",
        "MAX_RESTARTS",
        "EXCLUDE",
        "START_SECONDS",
    ),
    *("HEALTH_SECONDS", "HEALTH", "SCRATCH", "SRUN", "WRAP", "SETUP", "JOB", "CHILD", "STOPPING"),
    *("TERMINATED", "HOSTS", "MASTER_ADDR", "MASTER_PORT", "PYTHONSAFEPATH", "SRUN_CPUS_PER_TASK"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "IFS", "UID", "EUID", "PPID", "SHELLOPTS", "_"),
    *("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"),
}


@dataclass
class Preparation:
    """What the workers of a preparation read from the config.yaml of its folder."""

    job: Literal["prepare"]
    name: str
    output_dir: str
    seed: int
    vocab_size: int
    seq_len: int
    data: DataConfig


@dataclass
class SubmitConfig(RunConfig):
    """A run, or the preparation of its data, and its request to the cluster."""

    job: Literal["train", "prepare"]
    slurm: SlurmConfig

    @property
    def ranks_per_node(self) -> int:
        """The number of processes on each node: ranks, or workers of a preparation."""
        return self.data.num_workers if self.job == "prepare" else self.parallel.nproc_per_node

    @property
    def world_size(self) -> int:
        """The number of processes on all nodes."""
        return self.slurm.nodes * self.ranks_per_node

    def check(self, world_size: int | None = None) -> None:
        """Raises ConfigError with every broken rule of the run and of the request."""
        problems = self.slurm.problems()
        if self.job == "prepare":
            problems += [*self.model.problems(), *self.data.problems(), *value_problems(self)]
            if gpus := self.slurm.gpus_per_node:
                problems.append(f"slurm.gpus_per_node={gpus} but job=prepare uses no GPU; leave it out")
        else:
            problems += self.slurm.gpu_problems(self.ranks_per_node, self.device)
            try:
                super().check(world_size)
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)
