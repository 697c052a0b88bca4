"""The facts about SLURM on which slurm/job.sh relies, each shown on a real cluster without our code."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster

Job = Callable[..., str]
CHATTY = """
trap 'echo batch TERM' TERM
srun -K1 bash -c "trap 'echo rank TERM; exit 0' TERM; echo up; while :; do sleep 0.1; done" &
while kill -0 $! 2>/dev/null; do wait $!; done
echo end
"""


@pytest.fixture
def job(cluster: Cluster, folder: Path) -> Job:
    """`job(script, flags...)` queues a bash script with output in `out-<job>`; returns its id."""

    def submit(script: str, *flags: str) -> str:
        (folder / "job.sh").write_text(f"#!/usr/bin/env bash\n{script}")
        always = ["--mem=100", "-o", f"{folder}/out-%A", "--open-mode=append", "--parsable"]
        done = cluster.run("sbatch", *always, *flags, "job.sh", cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return submit


def said(folder: Path, job_id: str) -> str:
    path = folder / f"out-{job_id}"
    return path.read_text() if path.exists() else ""


def wait(what: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended(cluster: Cluster, job_id: str) -> Callable[[], bool]:
    return lambda: set(cluster.state(job_id).split()) <= {"COMPLETED", "FAILED", "CANCELLED"}


def test_1_the_last_task_of_an_array_has_the_id_of_the_array(cluster, job, folder):
    array = job('echo "task $SLURM_ARRAY_TASK_ID: $((SLURM_JOB_ID == SLURM_ARRAY_JOB_ID))"', "--array=0-2")
    wait(lambda: said(folder, array).count("task") == 3)
    assert sorted(said(folder, array).splitlines()) == ["task 0: 0", "task 1: 0", "task 2: 1"]


def test_2_scancel_terminates_the_batch_shell_too(cluster, job, folder):
    number = job(CHATTY, "-N2", "--ntasks-per-node=1")
    wait(lambda: said(folder, number).count("up") == 2)
    cluster.run("scancel", number)
    wait(lambda: "end" in said(folder, number))
    assert "batch TERM" in said(folder, number)
    assert cluster.state(number) in ("CANCELLED", "COMPLETING")


def test_3_preemption_with_a_grace_time_tells_the_ranks_only_and_does_not_requeue(cluster, job, folder):
    number = job(CHATTY, "-N1", "-w", "node14", "-p", "patient", "--requeue")
    wait(lambda: "up" in said(folder, number))
    job("true", "-N1", "-w", "node14", "-p", "main", "--exclusive")
    wait(lambda: "end" in said(folder, number))
    assert "rank TERM" in said(folder, number)
    assert "batch TERM" not in said(folder, number)
    wait(ended(cluster, number))
    assert cluster.state(number) == "COMPLETED"


def test_4_a_crash_looks_like_a_kill(cluster, job, folder):
    script = (
        "srun --kill-on-bad-exit=1 bash -c '[[ $SLURM_PROCID = 1 ]] && exit 3; sleep 60'; echo \"code $?\""
    )
    number = job(script, "-N2", "--ntasks-per-node=1")
    wait(lambda: "code" in said(folder, number))
    code = int(said(folder, number).split("code ")[1].split()[0])
    assert code in (3, 137, 143), "depends on which task srun sees end last"


def test_5_usr2_ends_torchrun(folder):
    """Therefore ranks are tasks of srun. (NCCL uses USR1, as seen on GPUs, so ranks do not use it.)"""
    (folder / "rank.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGUSR2, print)\nprint('up', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "rank.py"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as torchrun:
        assert torchrun.stdout.readline() == "up\n"
        torchrun.send_signal(12)
        assert torchrun.wait(timeout=60) == -12


def test_7_wait_returns_at_a_trapped_signal(folder):
    again = "wait %1; echo $?; "
    script = f"trap : USR1; sleep 3 & (sleep 0.3; kill -USR1 $$) & {again * 3}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["138", "0", "127"]


def test_8_what_srun_does_not_inherit(cluster, job, folder):
    """Steps do not inherit --cpus-per-task of the job, and scontrol lists the hostnames."""
    script = (
        "srun bash -c 'echo \"plain $SLURM_CPUS_PER_TASK\"'\n"
        "SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK srun bash -c 'echo \"exported $SLURM_CPUS_PER_TASK\"'\n"
        'scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1; hostname'
    )
    number = job(script, "-N2", "--ntasks-per-node=1", "-c", "3")
    wait(ended(cluster, number))
    lines = said(folder, number).splitlines()
    assert lines.count("exported 3") == 2
    assert lines[-2] == lines[-1]


def test_srun_would_die_of_usr2_before_it_passes_it_on(cluster, job, folder):
    """Therefore the job script has `trap '' USR2`; srun still forwards USR2 to the ranks."""
    rank = "trap 'echo heard' USR2; echo up; for i in {1..300}; do sleep 0.1; done"
    step = f'srun bash -c "{rank}" & kill -USR2 $!; wait $!'
    bare = job(f"{step}; echo code $?", "-N1")
    wait(ended(cluster, bare))
    assert "code 140" in said(folder, bare)
    careful = job(f"trap '' USR2\n{step}", "-N1")
    wait(lambda: "up" in said(folder, careful) or "heard" in said(folder, careful))
    cluster.run("scancel", "-s", "USR2", careful)
    wait(lambda: "heard" in said(folder, careful))
    cluster.run("scancel", careful)


def test_the_nodes_to_avoid_can_be_set_once_a_job_is_requeued(cluster, job, folder):
    number = job(
        "trap '' TERM; [[ ${SLURM_RESTART_COUNT:-0} = 1 ]] && exit; "
        "scontrol update JobId=$SLURM_JOB_ID ExcNodeList=node1 && echo early; "
        "scontrol requeue $SLURM_JOB_ID; "
        "scontrol update JobId=$SLURM_JOB_ID ExcNodeList=$(hostname) && echo late; hostname",
        "-N1",
    )
    wait(lambda: "late" in said(folder, number))
    assert "early" not in said(folder, number)
    wait(ended(cluster, number))
    assert (
        cluster.run("squeue", "-h", "-t", "all", "-j", number, "-o", "%N").stdout.strip()
        not in said(folder, number).split()
    )
