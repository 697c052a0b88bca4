"""What the job script decides, with fake SLURM commands; tests/slurm has scenarios on a real cluster."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from slurm.config import SubmitConfig
from slurm.script import job_script
from trainer.settings.typed import typed

JOB = "7"
COMMANDS = {
    "scontrol": """
echo "scontrol $*" >>asked
case "$*" in
"show hostnames"*) printf 'node1\\nnode2\\n' ;;
*"show job"*) echo " JobState=RUNNING Restarts=0 PreemptTime=None " ;;
requeue*) [ ! -e away ] || { rm away; exit 1; } ;;
esac""",
    "srun": """
echo "srun $*" >>asked
while [ "$1" != bash ]; do shift; done
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1
[ "$MODULE" = slurm.prepare ] || exec "$@"  # signals reach the rank
"$@"
echo "worker $?" >>asked""",
    "scancel": 'echo "scancel $*" >>asked',
    "sinfo": "echo idle",
    "sleep": "exec /bin/sleep 0.05",
}


def ends(state: str) -> str:
    """What a rank does that writes this state."""
    return f"""echo '{{"state": "{state}", "attempt": '$ATTEMPT'}}' >state"""


SAVE = "echo step-$ATTEMPT >latest"
# Until it is asked to stop, or `up` is gone. (bash cannot handle a signal that the job script ignores.)
WORK = f"""exec {sys.executable} -c '
import pathlib, signal, sys, time
def stop(*_):
    pathlib.Path("state").write_text("{{\\"state\\": \\"stopped\\", \\"attempt\\": 1}}")
    sys.exit()
signal.signal(signal.SIGUSR2, stop)
up = pathlib.Path("up")
up.touch()
for _ in range(500):
    time.sleep(0.02 * up.exists())
'"""


class Job:
    """A run folder, which is also where the script runs, and its script."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "code").mkdir()
        (folder / "logs").mkdir()
        (folder / "jobs").write_text(f"6\n{JOB}\n8\n9\n")
        self.command("python", ends("finished"))
        for name, text in COMMANDS.items():
            self.command(name, text)

    def command(self, name: str, text: str) -> None:
        """`python` is what a rank runs."""
        (self.folder / "bin").mkdir(exist_ok=True)
        (self.folder / "bin" / name).write_text(f"#!/bin/bash\ncd {self.folder}\n{text}\n")
        (self.folder / "bin" / name).chmod(0o755)

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        given = ["slurm.nodes=2", "micro_batch_size=1", "slurm.health.seconds=0", *overrides]
        given += [f"slurm.python={self.folder}/bin/python"]
        with initialize_config_module("conf", version_base="1.3"):
            config = typed(SubmitConfig, compose("submit", overrides=["name=t", *given]))
        (self.folder / "job").write_text(job_script(self.folder, [config], False))
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        slurm = {"SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_RESTART_COUNT": "0"}
        (self.folder / "asked").unlink(missing_ok=True)
        return subprocess.Popen(
            ["bash", "job"],
            cwd=self.folder,
            env={**os.environ, **slurm, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *overrides: str) -> tuple[int, str]:
        """The exit code and the log."""
        job = self.start(*overrides)
        said, _ = job.communicate(timeout=60)
        return job.returncode, said

    def signalled(self, number: signal.Signals, *overrides: str) -> tuple[int, str]:
        """The same of a job that gets a signal while its rank is at work."""
        job = self.start(*overrides)
        until = time.monotonic() + 60
        while not (self.folder / "up").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        job.send_signal(number)
        if number == signal.SIGTERM:
            (self.folder / "up").unlink()  # SLURM ends the ranks too
        said, _ = job.communicate(timeout=60)
        return job.returncode, said

    def asked(self, command: str) -> list[str]:
        """The arguments of each call of a command of SLURM."""
        lines = (self.folder / "asked").read_text().splitlines()
        return [line.removeprefix(f"{command} ") for line in lines if line.startswith(f"{command} ")]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_run_that_is_over_is_not_started(job: Job) -> None:
    (job.folder / "state").write_text('{"state": "finished", "attempt": 3}')
    code, said = job.run()
    assert (code, job.asked("srun")) == (0, [])
    assert "the run is finished" in said
    (job.folder / "state").write_text('{"state": "failed", "attempt": 3}')
    (job.folder / "stop").write_text("somebody said so")
    code, said = job.run()
    assert (code, job.asked("srun")) == (0, [])
    assert "not started: somebody said so" in said


def test_a_run_that_finishes_cancels_the_rest_of_its_chain(job: Job) -> None:
    code, said = job.run("slurm.resume=chain")
    assert (code, job.asked("scancel")) == (0, ["8 9"])
    assert "finished" in said
    (job.folder / "state").unlink()
    code, said = job.run()
    assert (code, job.asked("scancel")) == (0, []), "without a chain, these are jobs of earlier submissions"


def test_crashes_are_restarted_a_few_times_without_the_bad_nodes(job: Job) -> None:
    job.command("python", f"{SAVE}; {ends('failed')}; exit 3")
    (job.folder / "excluded").write_text("node2\n")
    settings = ["slurm.max_restarts=2", "slurm.exclude=node9"]
    for number in (1, 2):
        code, said = job.run(*settings)
        assert code == 0
        assert f"(restart {number} of 2)" in said
        asked = job.asked("scontrol")
        assert asked[-2:] == [f"requeue {JOB}", f"update JobId={JOB} ExcNodeList=node9,node2"]
    code, said = job.run(*settings)
    assert code == 1
    assert "giving up: the attempt ended 'failed', after 2 restarts (slurm.max_restarts=2)" in said
    assert f"requeue {JOB}" not in job.asked("scontrol")
    assert (job.folder / "stop").exists()


def test_a_crash_that_saved_nothing_is_not_restarted(job: Job) -> None:
    job.command("python", f"{ends('failed')}; exit 3")
    code, said = job.run()
    assert code == 1
    assert "giving up: the attempt ended 'failed' and saved nothing new" in said
    assert f"requeue {JOB}" not in job.asked("scontrol")


def test_before_the_time_limit_the_ranks_save_and_the_job_is_queued_again(job: Job) -> None:
    """That is no crash, and a controller that is away for a while is waited for."""
    job.command("python", f"{SAVE}; {WORK}")
    (job.folder / "away").touch()
    code, said = job.signalled(signal.SIGUSR1)
    assert code == 0, said
    assert "saved and stopped; going on after what is saved (step-1)" in said
    assert job.asked("scontrol").count(f"requeue {JOB}") == 2
    assert not (job.folder / "restarts").exists()


def test_a_cancelled_job_stops_its_chain(job: Job) -> None:
    job.command("python", WORK)
    code, said = job.signalled(signal.SIGTERM, "slurm.resume=chain")
    assert code == 143
    assert "ended by SLURM" in said
    assert (job.folder / "stop").read_text() == "cancelled\n"


def test_a_node_that_does_not_answer_is_left_out(job: Job) -> None:
    job.command("python", '[ "$2" != slurm.health ] || touch "$3/node1.0"')
    code, said = job.run("slurm.health.seconds=30")
    assert code == 0
    assert "health: node2: no answer within 30 s" in said
    assert "restart 1 of" in said
    assert (job.folder / "excluded").read_text() == "node2\n"
    assert job.asked("scontrol")[-1].endswith("ExcNodeList=node2")


@pytest.mark.parametrize(("code", "of_worker"), [(2, 2), (1, 0), (137, 0)])
def test_only_a_mistake_of_the_user_ends_all_workers(job: Job, code: int, of_worker: int) -> None:
    """Of a preparation. One that failed is not queued again, even if it has made slices."""
    job.command("python", f"mkdir -p data/slices/a-1; {ends('failed')}; exit {code}")
    (job.folder / "data").mkdir()
    (job.folder / "one.jsonl").write_text("")
    source = f"+data.sources.t={{kind: jsonl, paths: [{job.folder}/one.jsonl]}}"
    done, said = job.run("job=prepare", "data=jsonl", f"data.dir={job.folder}/data", source)
    assert job.asked("worker") == [str(of_worker)]
    assert done == 1
    assert "giving up: the preparation failed, see above" in said
    assert f"requeue {JOB}" not in job.asked("scontrol")
