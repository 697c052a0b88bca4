"""The test cluster as the tests use it: submit, look, break a node, mend it."""

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
LAB = 41  # a cluster of its own, beside what anybody else may have started

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
    """Why no cluster can be started here."""
    if os.getuid() != 0:
        return "the test cluster needs root"
    if shutil.which("slurmctld") is None and shutil.which("apt-get") is None:
        return "the test cluster needs the slurm packages of Debian or Ubuntu"
    return None


@dataclass
class Cluster:
    """One running cluster and the prepared data that its runs share."""

    environment: dict[str, str]
    data: list[str]  # overrides that name it

    @classmethod
    def start(cls, data: list[str], nodes: int = NODES, **settings: str) -> "Cluster":
        """Start it, or mend it where a test broke it; `settings` are those of slurm-up."""
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
        """Stop it and everything on it."""
        subprocess.run([HERE / "slurm-down"], env=self.environment, check=True, timeout=60)

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A command on the login node."""
        return subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
        )

    def python(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """`python -m ...` on the login node."""
        return self.run(sys.executable, "-m", *arguments, cwd=cwd)

    def submit(self, folder: Path, name: str, *overrides: str) -> "Run":
        """Queue a small run in `folder`."""
        of_sweep = ["-m"] if "-m" in overrides else []
        given = [override for override in overrides if override != "-m"]
        done = self.python("slurm", *of_sweep, *SMALL, *self.data, f"name={name}", *given, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return Run(self, folder / "runs" / name)

    def state(self, job: str) -> str:
        """What SLURM says of a job, ended ones too."""
        return self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T").stdout.strip()

    def set(self, job: str, what: str) -> bool:
        """`scontrol update` of a job."""
        return self.run("scontrol", "update", f"JobId={job}", what).returncode == 0

    def node_pids(self, node: int) -> list[int]:
        """Every process on a node."""
        listed = self.run("ip", "netns", "pids", f"slab{LAB}-node{node}").stdout
        return [int(pid) for pid in listed.split()]

    def kill_node(self, node: int) -> None:
        """As by the power switch."""
        for pid in self.node_pids(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cable(self, node: int, position: str) -> None:
        """`down` or `up`."""
        assert self.run("ip", "link", "set", f"slab{LAB}v{node}", position).returncode == 0

    def only(self, *nodes: int) -> str:
        """The override that keeps a run on some nodes."""
        others = [f"node{n}" for n in range(1, NODES + 1) if n not in nodes]
        return f"slurm.exclude='{','.join(others)}'"


@dataclass
class Run:
    """A run on the cluster."""

    cluster: Cluster
    folder: Path

    @property
    def jobs(self) -> list[str]:
        """Its jobs, oldest first."""
        return (self.folder / "jobs").read_text().split()

    @property
    def log(self) -> str:
        """What the job script and rank 0 said."""
        path = self.folder / "logs/job.log"
        return path.read_text() if path.exists() else ""

    @property
    def state(self) -> dict:
        """The state file."""
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
        """The loss curve and its company; of a step done twice the last."""
        keys = ("loss", "balance_loss", "grad_norm", "learning_rate", "max_violation")
        return {line["step"]: [line[key] for key in keys] for line in self.lines}

    def ranks(self) -> list[int]:
        """Processes of its ranks, by node name."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
                if b"trainer.run" in words and b"python" in words[0] and str(self.folder).encode() in words:
                    environment = (path / "environ").read_bytes().split(b"\0")
                    rank = next(int(entry[5:]) for entry in environment if entry.startswith(b"RANK="))
                    found.append((rank, int(path.name)))
            except (FileNotFoundError, ProcessLookupError):
                continue
        return [pid for _, pid in sorted(found)]

    def wait(self, what: Callable[["Run"], object], seconds: float = 240) -> None:
        """Until `what` holds. Fails with the log where it does not come, or the run has ended otherwise."""
        deadline = time.monotonic() + seconds
        while not what(self):
            assert time.monotonic() < deadline, f"waited in vain\n{self.state}\n{self.log}"
            time.sleep(0.01)

    @property
    def saved(self) -> int:
        """The step of the newest checkpoint."""
        path = self.folder / "latest"
        return int(path.read_text().strip().removeprefix("step-")) if path.exists() else 0

    def pause(self, logged: int = 1, saved: int = 0) -> int:
        """Hold rank 0 (and so all) once a step is logged and one is saved; returns its process id."""
        self.wait(lambda run: run.step >= 1)
        main = self.ranks()[0]
        self.wait(lambda run: run.step >= logged and run.saved >= saved)
        os.kill(main, signal.SIGSTOP)
        return main

    def finish(self, attempts: int) -> "Run":
        """Wait for its end and check the number of attempts."""
        self.wait(lambda run: run.state["state"] == "finished")
        assert self.state == {"state": "finished", "attempt": attempts}, self.log
        self.wait(lambda run: run.cluster.state(run.jobs[-1]) in ("COMPLETED", "CANCELLED"), 60)
        return self
