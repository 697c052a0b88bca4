"""Failures and stops of jobs on a real cluster, for a run on two nodes with experts spread over both.

Every scenario ends with the loss curve of an undisturbed run, bit for bit. Scenarios mostly wait for SLURM,
so they run in parallel; a scenario that breaks a node has its own nodes.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster import Cluster, Run

pytestmark = pytest.mark.timeout(900)
REPOSITORY = Path(__file__).parents[2]
SCENARIOS: dict[str, Callable[[Cluster, Path], Run]] = {}


def scenario(function: Callable[[Cluster, Path], Run]) -> Callable[[Cluster, Path], Run]:
    SCENARIOS[function.__name__] = function
    return function


@scenario
def straight(cluster: Cluster, folder: Path) -> Run:
    """The undisturbed run. The checkout is deleted before the job starts; the run has its own copy."""
    checkout = folder / "checkout"
    for package in ("trainer", "moe", "data_pipeline", "slurm", "conf"):
        shutil.copytree(REPOSITORY / package, checkout / package)
    with (checkout / "trainer/ranks/launch.py").open("a") as module:
        module.write('\nprint("code of", __file__, flush=True)\n')
    submitting = Cluster({**cluster.environment, "PYTHONPATH": str(checkout)}, cluster.data)
    run = submitting.submit(folder, "straight", cluster.only(1, 2), "+slurm.sbatch.hold=true")
    shutil.rmtree(checkout)
    assert cluster.run("scontrol", "release", run.jobs[0]).returncode == 0
    run.finish(attempts=1)
    assert run.log.count(f"code of {run.folder}/code/trainer/ranks/launch.py") == 2, "once per rank"
    return run


@scenario
def time_limit(cluster: Cluster, folder: Path) -> Run:
    """SLURM sends USR1 before the limit: all ranks save, the job is requeued; one W&B run, one log."""
    early = ["slurm.time=60", "slurm.stop_before_seconds=900", "tracker.wandb=offline"]
    run = cluster.submit(folder, "time", cluster.only(1, 2), *early)
    paused = run.pause(saved=8)
    minutes = int(cluster.run("squeue", "-h", "-j", run.jobs[0], "-o", "%M").stdout.split(":")[0])
    assert cluster.set(run.jobs[0], f"TimeLimit={minutes + 6}")
    run.wait(lambda run: "asking all ranks to save" in run.log)
    os.kill(paused, signal.SIGCONT)
    run.wait(lambda run: run.state["state"] == "stopped")
    run.wait(lambda run: cluster.state(run.jobs[0]) == "PENDING")
    assert cluster.set(run.jobs[0], "TimeLimit=60")
    run.finish(attempts=2)
    assert len(run.jobs) == 1
    assert [line["step"] for line in run.lines] == list(range(1, 25)), "no step may be lost or repeated"
    assert run.log.count("training on") == 2
    ids = {path.name.split("-")[-1] for path in (run.folder / "wandb").glob("offline-run-*")}
    assert len(ids) == 1
    return run


@scenario
def preemption(cluster: Cluster, folder: Path) -> Run:
    """With a grace time SLURM signals only the ranks. They save and exit; the script must requeue the job."""
    run = cluster.submit(folder, "preempted", cluster.only(3, 4), "slurm.partition=patient")
    run.pause(saved=8)  # SLURM sends CONT with TERM, so rank 0 wakes up for it
    urgent = ["--exclusive", "-N2", "-w", "node[3-4]", "-p", "main", "--wrap", "sleep 1", "-o", "/dev/null"]
    assert cluster.run("sbatch", *urgent).returncode == 0
    run.wait(lambda run: "saved and stopped; going on" in run.log)
    return run.finish(attempts=2)


@scenario
def dead_node(cluster: Cluster, folder: Path) -> Run:
    """A node dies before the first checkpoint: the run is not at fault, so it is requeued all the same."""
    run = cluster.submit(folder, "dead_node", cluster.only(5, 6, 7))
    paused = run.pause(logged=2)
    cluster.kill_node(6)
    os.kill(paused, signal.SIGCONT)
    return run.finish(attempts=2)


@scenario
def cut_off_node(cluster: Cluster, folder: Path) -> Run:
    """The node of rank 0 and the job script is cut off, stays alive, and returns when the run is finished."""
    run = cluster.submit(folder, "cut_off", cluster.only(8, 9, 10))
    paused = run.pause(saved=8)
    cluster.cable(8, "down")
    os.kill(paused, signal.SIGCONT)
    run.finish(attempts=2)
    lines = run.lines
    assert paused in run.ranks(), "the old rank should still be waiting for its peer"
    cluster.cable(8, "up")
    run.wait(lambda run: not run.ranks())
    assert run.state == {"state": "finished", "attempt": 2}
    assert run.lines == lines
    assert not (run.folder / "stop").exists()
    return run


@scenario
def crash_with_progress(cluster: Cluster, folder: Path) -> Run:
    """A killed rank ends all others; the attempt has saved a checkpoint, so the job is requeued."""
    run = cluster.submit(folder, "crash", cluster.only(1, 2))
    paused = run.pause(saved=8)
    os.kill(run.ranks()[1], signal.SIGKILL)
    os.kill(paused, signal.SIGCONT)
    run.finish(attempts=2)
    assert "(restart 1 of 5)" in run.log
    return run


@scenario
def crash_without_progress(cluster: Cluster, folder: Path) -> Run:
    """Without a new checkpoint the run could crash forever: the job is FAILED until somebody resumes it."""
    run = cluster.submit(folder, "again", cluster.only(1, 2))
    os.kill(run.pause(logged=2), signal.SIGKILL)
    run.wait(lambda run: cluster.state(run.jobs[0]) == "FAILED")
    assert "saved nothing new" in run.log
    assert "saved nothing new" in cluster.python("slurm.status", "runs/again", cwd=folder).stdout
    assert cluster.python("slurm.resume", "runs/again", cwd=folder).returncode == 0
    return run.finish(attempts=2)


@scenario
def crashes_too_often(cluster: Cluster, folder: Path) -> Run:
    """Each attempt saves a new checkpoint and crashes, until slurm.max_restarts is reached."""
    run = cluster.submit(folder, "often", cluster.only(1, 2), "slurm.max_restarts=1")
    os.kill(run.pause(saved=8), signal.SIGKILL)
    run.wait(lambda run: run.state["attempt"] == 2)
    os.kill(run.pause(saved=16), signal.SIGKILL)
    run.wait(lambda run: cluster.state(run.jobs[0]) == "FAILED")
    assert "after 1 restarts (slurm.max_restarts=1)" in run.log
    assert cluster.python("slurm.resume", "runs/often", cwd=folder).returncode == 0
    return run.finish(attempts=3)


@scenario
def cancelled(cluster: Cluster, folder: Path) -> Run:
    """scancel lets the ranks save, and the job stays cancelled."""
    run = cluster.submit(folder, "cancelled", cluster.only(1, 2))
    run.pause(saved=8)
    assert cluster.run("scancel", run.jobs[0]).returncode == 0
    run.wait(lambda run: cluster.state(run.jobs[0]) == "CANCELLED")
    run.wait(lambda run: not run.ranks())
    time.sleep(8)  # longer than SLURM here takes to start a requeued job
    assert cluster.state(run.jobs[0]) == "CANCELLED"
    assert cluster.python("slurm.resume", "runs/cancelled", cwd=folder).returncode == 0
    run.finish(attempts=2)
    assert len(run.jobs) == 2
    return run


@scenario
def stopped(cluster: Cluster, folder: Path) -> Run:
    """slurm.stop saves and ends the run, and the job is not requeued; slurm.resume continues the run."""
    run = cluster.submit(folder, "stopped", cluster.only(1, 2))
    paused = run.pause(saved=8)
    assert "saves and ends" in cluster.python("slurm.stop", "runs/stopped", cwd=folder).stdout
    run.wait(lambda run: "asking all ranks" in run.log)
    os.kill(paused, signal.SIGCONT)
    run.wait(lambda run: cluster.state(run.jobs[0]) == "COMPLETED")
    assert run.state["state"] == "stopped"
    assert "stopped by slurm.stop" in cluster.python("slurm.status", "runs/stopped", cwd=folder).stdout
    assert cluster.python("slurm.resume", "runs/stopped", cwd=folder).returncode == 0
    run.finish(attempts=2)
    assert [line["step"] for line in run.lines] == list(range(1, 25)), "no step may be lost or repeated"
    return run


@scenario
def chain(cluster: Cluster, folder: Path) -> Run:
    """Where requeueing is forbidden, the next job of a chain continues the run; the rest are cancelled."""
    chained = ["slurm.resume=chain", "slurm.chain_length=3"]
    run = cluster.submit(folder, "chain", cluster.only(1, 2), *chained)
    assert len(run.jobs) == 3
    paused = run.pause(saved=8)
    assert cluster.run("scancel", "--batch", "--signal=USR1", run.jobs[0]).returncode == 0
    run.wait(lambda run: "asking all ranks" in run.log)
    os.kill(paused, signal.SIGCONT)
    run.finish(attempts=2)
    run.wait(lambda run: cluster.state(run.jobs[1]) == "COMPLETED")  # it cancels the third before it ends
    assert [cluster.state(job) for job in run.jobs] == ["COMPLETED", "COMPLETED", "CANCELLED"]
    return run


@scenario
def chain_cancelled(cluster: Cluster, folder: Path) -> Run:
    """The next job of a chain continues the run however the previous job ended, except after scancel."""
    chained = ["slurm.resume=chain", "slurm.chain_length=2"]
    run = cluster.submit(folder, "chain_cancelled", cluster.only(1, 2), *chained)
    run.pause(saved=8)
    assert cluster.run("scancel", run.jobs[0]).returncode == 0
    run.wait(lambda run: cluster.state(run.jobs[1]) in ("CANCELLED", "COMPLETED"))
    assert run.state["attempt"] == 1
    assert cluster.python("slurm.resume", "runs/chain_cancelled", cwd=folder).returncode == 0
    return run.finish(attempts=2)


@scenario
def bad_node(cluster: Cluster, folder: Path) -> Run:
    """A node with a full scratch disk is named and left out; the job starts on other nodes."""
    scratch = folder / "scratch"
    scratch.mkdir()
    slurmd = Path(f"/tmp/slurm-lab-{cluster.environment['SLURM_LAB_ID']}/run/slurmd.node12.pid").read_text()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(scratch)]
    assert cluster.run("nsenter", "-t", slurmd.strip(), "-m", *mount).returncode == 0
    health = ["slurm.health.seconds=180", "slurm.health.min_free_gib=0.01", f"+slurm.env.TMPDIR={scratch}"]
    run = cluster.submit(folder, "bad_node", cluster.only(11, 12, 13), *health)
    run.finish(attempts=1)
    assert f"health: node12: 0.0 GiB free in {scratch}" in run.log
    assert "training on node11 node13" in run.log
    return run


@scenario
def sweep(cluster: Cluster, folder: Path) -> Run:
    """One array. Only its last point crashes and is requeued, although its job id is that of the array."""
    submitted = cluster.submit(
        folder, "sweep", cluster.only(1, 2), "-m", "seed=7,1234", "slurm.max_parallel=2"
    )
    first, last = (Run(cluster, submitted.folder / str(point)) for point in (0, 1))
    array = last.jobs[0].split("_")[0]
    assert (first.jobs, last.jobs) == ([f"{array}_0"], [f"{array}_1"])
    shown = cluster.python("slurm.status", "runs/sweep", cwd=folder).stdout
    assert "seed=7" in shown
    paused = last.pause(saved=8)
    os.kill(last.ranks()[1], signal.SIGKILL)
    os.kill(paused, signal.SIGCONT)
    first.finish(attempts=1)
    last.finish(attempts=2)
    assert first.log.count(" job ") == 2, "training and finished, but no requeue"
    shown = cluster.python("slurm.status", "runs/sweep", cwd=folder).stdout
    assert shown.count("finished") == 2
    assert shown.count("24/24") == 2
    return last


SLOW = {"crashes_too_often", "chain_cancelled", "stopped"}


@pytest.fixture(scope="session")
def futures(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future]]:
    """The running scenarios that this session needs, by name."""
    chosen = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    wanted = [name for name in SCENARIOS if name == "straight" or name in chosen]
    with ThreadPoolExecutor(5) as pool:
        yield {name: pool.submit(SCENARIOS[name], cluster, tmp_path_factory.mktemp(name)) for name in wanted}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in SCENARIOS]
)
def test_a_run_survives(futures: dict[str, Future], name: str):
    undisturbed, run = futures["straight"].result(), futures[name].result()
    assert sorted(run.curve) == list(range(1, 25))
    assert run.curve == undisturbed.curve


def test_slurmctld_may_be_away(cluster: Cluster, folder: Path, futures: dict[str, Future]):
    """A rank crashes while SLURM does not answer: the script waits, then requeues."""
    for future in futures.values():
        future.exception()  # wait for its end: it needs slurmctld
    run = cluster.submit(folder, "away", cluster.only(1, 2))
    paused = run.pause(saved=8)
    lab, before = Path(cluster.environment["SLURM_CONF"]).parent, time.time()
    assert cluster.set(run.jobs[0], "Comment=known")
    run.wait(lambda run: (lab / "state/job_state").stat().st_mtime > before)  # else it forgets the job
    os.kill(int((lab / "run/slurmctld.pid").read_text()), signal.SIGKILL)
    os.kill(run.ranks()[1], signal.SIGKILL)
    os.kill(paused, signal.SIGCONT)
    run.wait(lambda run: run.state["state"] == "failed" and not run.ranks())
    Cluster.start(cluster.data)
    run.finish(attempts=2)
    assert run.curve == futures["straight"].result().curve
