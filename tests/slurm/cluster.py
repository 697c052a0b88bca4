"""The test cluster as the tests use it: submit jobs, inspect them, break a node, repair it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import commands
import pytest

HERE = Path(__file__).parent
NODES = 14
LAB = 41  # the tests' own cluster, which can run beside others

SMALL = [
    *commands.SMALL,
    "stage.train_tokens=12288",  # 24 steps
    "parallel.nproc_per_node=1",
    "checkpoint.every_steps=8",
    "evaluate.every_steps=0",
    "slurm.nodes=2",
    "slurm.mem=500",
    "slurm.health.seconds=0",
]


def why_not() -> str | None:
    """Why no cluster can be started here; None if one can."""
    if os.getuid() != 0:
        return "the test cluster needs root"
    if shutil.which("slurmctld") is None and shutil.which("apt-get") is None:
        return "the test cluster needs the slurm packages of Debian or Ubuntu"
    return None


@dataclass
class Cluster:
    """One running cluster and the prepared data that its runs share."""

    environment: dict[str, str]
    data: list[str]  # overrides that name the data

    @classmethod
    def start(cls, data: list[str], nodes: int = NODES, **settings: str) -> "Cluster":
        """Start the cluster, or repair what a test broke; `settings` are those of slurm-up."""
        lab = {"SLURM_LAB_ID": str(LAB), "SLURM_LAB_CONF": str(HERE / "lab.conf"), **settings}
        up = subprocess.run(
            [HERE / "slurm-up", str(nodes)],
            env={**os.environ, **lab},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        if "apt-get failed" in up.stderr:
            pytest.skip("the slurm packages of Debian or Ubuntu cannot be installed here")
        assert up.returncode == 0, up.stderr
        environment = {**os.environ, **lab, "SLURM_CONF": f"/tmp/slurm-lab-{lab['SLURM_LAB_ID']}/slurm.conf"}
        environment["CUDA_VISIBLE_DEVICES"] = ""  # the nodes share this machine: no job may take its GPUs
        environment |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONPATH": str(HERE.parents[1])}
        return cls(environment, data)

    def down(self) -> None:
        """Stop the cluster and everything on it."""
        subprocess.run([HERE / "slurm-down"], env=self.environment, check=True, timeout=60)

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node."""
        return subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
        )

    def python(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run `python -m ...` on the login node."""
        return self.run(sys.executable, "-m", *arguments, cwd=cwd)

    def submit(self, folder: Path, name: str, *overrides: str) -> "Run":
        """Queue a small run in `folder`."""
        of_sweep = ["-m"] if "-m" in overrides else []
        given = [override for override in overrides if override != "-m"]
        done = self.python("slurm", *of_sweep, *SMALL, *self.data, f"name={name}", *given, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return Run(self, folder / "runs" / name)

    def state(self, job: str) -> str:
        """The state of a job in SLURM, also of a job that has ended."""
        return self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T").stdout.strip()

    def set(self, job: str, what: str) -> bool:
        """Change a job with `scontrol update`; returns whether that worked."""
        return self.run("scontrol", "update", f"JobId={job}", what).returncode == 0

    def node_pids(self, node: int) -> list[int]:
        """The ids of all processes on a node."""
        listed = self.run("ip", "netns", "pids", f"slab{LAB}-node{node}").stdout
        return [int(pid) for pid in listed.split()]

    def kill_node(self, node: int) -> None:
        """Kill all processes on a node, as a power failure would."""
        for pid in self.node_pids(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cable(self, node: int, position: str) -> None:
        """Set the network link of a node `down` or `up`."""
        assert self.run("ip", "link", "set", f"slab{LAB}v{node}", position).returncode == 0

    def only(self, *nodes: int) -> str:
        """The override that keeps a run on the given nodes."""
        others = [f"node{n}" for n in range(1, NODES + 1) if n not in nodes]
        return f"slurm.exclude='{','.join(others)}'"


@dataclass
class Run:
    """A run on the cluster."""

    cluster: Cluster
    folder: Path

    @property
    def jobs(self) -> list[str]:
        """The jobs of the run, oldest first."""
        return (self.folder / "jobs").read_text().split()

    @property
    def log(self) -> str:
        """The output of the job script and rank 0."""
        path = self.folder / "logs/job.log"
        return path.read_text() if path.exists() else ""

    @property
    def state(self) -> dict:
        """The content of the state file."""
        path = self.folder / "state"
        return json.loads(path.read_text()) if path.exists() else {"state": "new", "attempt": 0}

    @property
    def lines(self) -> list[dict]:
        """The logged steps in metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        whole = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [line for line in whole if "loss" in line]

    @property
    def step(self) -> int:
        """The newest logged step of the current attempt."""
        attempt = self.state["attempt"]
        return max((line["step"] for line in self.lines if line["attempt"] == attempt), default=0)

    @property
    def curve(self) -> dict[int, list[float]]:
        """Loss and related metrics by step; for a repeated step, the last values."""
        keys = ("loss", "balance_loss", "grad_norm", "learning_rate", "max_violation")
        return {line["step"]: [line[key] for key in keys] for line in self.lines}

    def ranks(self) -> list[int]:
        """Process ids of the run's ranks, in order of rank."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
                ours = {b"trainer.run", b"slurm.prepare"} & set(words) and str(self.folder).encode() in words
                if ours and b"python" in words[0]:
                    environment = (path / "environ").read_bytes().split(b"\0")
                    rank = next(int(entry[5:]) for entry in environment if entry.startswith(b"RANK="))
                    found.append((rank, int(path.name)))
            except (FileNotFoundError, ProcessLookupError):
                continue
        return [pid for _, pid in sorted(found)]

    def wait(self, what: Callable[["Run"], object], seconds: float = 240) -> None:
        """Wait until `what` holds; after `seconds`, fail with the state and the log."""
        deadline = time.monotonic() + seconds
        while not what(self):
            assert time.monotonic() < deadline, f"timed out\n{self.state}\n{self.log}"
            time.sleep(0.01)

    @property
    def saved(self) -> int:
        """The step of the newest checkpoint."""
        path = self.folder / "latest"
        return int(path.read_text().strip().removeprefix("step-")) if path.exists() else 0

    def pause(self, logged: int = 1, saved: int = 0) -> int:
        """Pause rank 0 (so that all wait) once these steps are logged and saved; returns its process id."""
        self.wait(lambda run: run.step >= 1)
        main = self.ranks()[0]
        self.wait(lambda run: run.step >= logged and run.saved >= saved)
        os.kill(main, signal.SIGSTOP)
        return main

    def finish(self, attempts: int) -> "Run":
        """Wait until the run is finished, and check the number of attempts."""
        self.wait(lambda run: run.state["state"] == "finished")
        assert self.state == {"state": "finished", "attempt": attempts}, self.log
        self.wait(lambda run: run.cluster.state(run.jobs[-1]) in ("COMPLETED", "CANCELLED"), 60)
        return self
