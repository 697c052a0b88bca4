"""What a submission is: a run and what it asks of the cluster. Torch-free, for login nodes."""

import re
from dataclasses import dataclass
from typing import Any

from moe.config import ConfigError
from trainer.config import RunConfig
from trainer.parallel import ParallelPlan
from trainer.typed import similar


@dataclass
class HealthConfig:
    """What the nodes must pass before training."""

    seconds: int
    min_free_gib: float
    max_skew_seconds: float


@dataclass
class ContainerConfig:
    """The image in which the ranks run."""

    kind: str
    image: str | None
    mounts: list[str]


@dataclass
class SlurmConfig:
    """What the job asks for, and how it goes on after an interruption. Values in conf/slurm/, laws here."""

    nodes: int
    gpus_per_node: int
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
    max_parallel: int
    resume: str
    chain_length: int
    max_restarts: int
    stop_before_seconds: int
    health: HealthConfig
    container: ContainerConfig
    python: str | None
    setup: list[str]
    env: dict[str, str]
    dry_run: bool

    def flags(self) -> dict[str, str | None]:
        """sbatch's long flags and their values (None for a switch), those of `sbatch` last."""
        typed = {
            "nodes": self.nodes,
            "gpus-per-node": self.gpus_per_node or None,
            "cpus-per-task": self.cpus_per_task,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "reservation": self.reservation,
            "time": self.time,
            "mem": self.mem,
            "exclude": self.exclude,
            "nodelist": self.nodelist,
            "exclusive": self.exclusive,
            "switches": self.switches,
        }
        given = {str(key).replace("_", "-"): value for key, value in self.sbatch.items()}
        return {
            key: None if value is True else str(value)
            for key, value in {**typed, **given}.items()
            if value is not None and value is not False
        }

    def problems(self, nproc_per_node: int) -> list[str]:
        """Every broken law, one line each."""
        found = []
        for key, number, least in [
            ("nodes", self.nodes, 1),
            ("gpus_per_node", self.gpus_per_node, 0),
            ("max_parallel", self.max_parallel, 0),
            ("chain_length", self.chain_length, 1),
            ("max_restarts", self.max_restarts, 0),
            ("stop_before_seconds", self.stop_before_seconds, 1),
            ("health.seconds", self.health.seconds, 0),
        ]:
            if number < least:
                found.append(f"slurm.{key}={number} is below {least}; use {least} or more")
        for key, value, choices in [
            ("resume", self.resume, ("requeue", "chain")),
            ("container.kind", self.container.kind, ("none", "pyxis", "apptainer")),
        ]:
            if value not in choices:
                found.append(f"slurm.{key}={value} is unknown; use {', '.join(choices)}")
        if self.gpus_per_node and self.gpus_per_node != nproc_per_node:
            found.append(
                f"slurm.gpus_per_node={self.gpus_per_node} but parallel.nproc_per_node={nproc_per_node}: "
                "a rank is one GPU; give both the same number"
            )
        if self.container.kind != "none" and self.container.image is None:
            found.append(f"slurm.container.kind={self.container.kind} needs slurm.container.image=...")
        for key in map(str, self.sbatch):
            if (flag := key.replace("_", "-")) in _OURS:
                found.append(f"slurm.sbatch.{key} is set by {_OURS[flag]}; remove it")
            elif not re.fullmatch(r"[a-z][a-z0-9-]+", flag):
                found.append(f"slurm.sbatch.{key} is no long flag of sbatch{similar(flag, self.flags())}")
        for key, text in self.flags().items():
            if text is not None and re.search(r"[\x00-\x1f]", text):
                found.append(f"slurm {key}={text!r} holds a control character; remove it")
        for key in self.env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
                found.append(f"slurm.env.{key} is no name of an environment variable")
            elif re.search(r"KEY|TOKEN|SECRET|PASSW", key.upper()):
                found.append(
                    f"slurm.env.{key} looks like a secret, and the job script is no place for one; "
                    "export it where you submit: jobs get the environment"
                )
        return found


# Flags that the job script relies on, and what sets them.
_OURS = {
    "job-name": "name",
    "output": "output_dir and name",
    "error": "output_dir and name",
    "array": "the sweep",
    "dependency": "slurm.resume=chain",
    "signal": "slurm.stop_before_seconds",
    "requeue": "slurm.resume",
    "no-requeue": "slurm.resume",
    "open-mode": "the run folder",
    "ntasks": "slurm.nodes and parallel.nproc_per_node",
    "ntasks-per-node": "parallel.nproc_per_node",
    "chdir": "the run folder",
    "wrap": "the job script",
    "parsable": "the submission",
    "test-only": "slurm.dry_run",
}


@dataclass
class SubmitConfig(RunConfig):
    """A run and the cluster it goes to."""

    slurm: SlurmConfig

    def check(self, plan: ParallelPlan) -> None:
        """Raises ConfigError with every broken law of the run and of the request."""
        problems = self.slurm.problems(self.parallel.nproc_per_node)
        try:
            super().check(plan)
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError(problems)

    @property
    def plan(self) -> ParallelPlan:
        """The layout over all nodes."""
        return ParallelPlan.of(self, self.slurm.nodes * self.parallel.nproc_per_node)
