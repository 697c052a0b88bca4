"""Preparing data on several nodes: the result is that of one process to the byte, whatever dies meanwhile."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import commands
import pytest
from cluster import SMALL, Cluster, Run

pytestmark = pytest.mark.timeout(600)
ROWS = 400  # of each source


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a corpus with bad and repeated rows, and its preparation by one process."""
    folder = tmp_path_factory.mktemp("text")
    overrides = commands.prepare_corpus(folder)
    shutil.rmtree(folder / "prepared")
    for path in folder.glob("*.jsonl"):
        rows = path.read_text().splitlines(keepends=True)
        path.write_text("".join([*rows[:ROWS], "{bad\n", *rows[:9], *rows[ROWS:]]))
    overrides += ["data.slice_bytes=1500", "model.vocab_size=512"]
    done = commands.python("data_pipeline", "name=t", *overrides, cwd=folder)
    assert done.returncode == 0, done.stderr
    return overrides


def submit(cluster: Cluster, text: list[str], folder: Path, *overrides: str) -> Run:
    """Queue a preparation of two workers on each of two nodes, into folder/prepared."""
    own = ["job=prepare", "name=t", "data.num_workers=2", f"data.dir={folder}/prepared"]
    done = cluster.python("slurm", *SMALL, *text, *own, *overrides, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 nodes, 4 workers" in done.stdout
    return Run(cluster, folder / "runs/t-prepare")


def written(folder: Path) -> list[str]:
    """The slices that are encoded."""
    found = folder / "prepared/slices"
    return [name for name in os.listdir(found) if name[0] != "."] if found.is_dir() else []


@contextmanager
def standing(run: Run, folder: Path) -> Iterator[list[int]]:
    """The workers, standing still in the middle of their work until the end of the block."""
    run.wait(lambda run: len(written(folder)) >= 5)
    workers = run.ranks()
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(0.2)  # what is on its way arrives
    assert not (folder / "prepared/manifest.json").exists(), "too late to disturb anything"
    yield workers
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def finish(run: Run, folder: Path, text: list[str], attempts: int) -> None:
    run.finish(attempts)
    alone = next(override for override in text if override.startswith("data.dir=")).partition("=")[2]
    assert commands.contents(folder / "prepared") == commands.contents(alone)
    assert not list((folder / "prepared").rglob(".*"))


def status(cluster: Cluster, folder: Path) -> dict[str, str]:
    done = cluster.python("slurm.status", "runs/t-prepare", cwd=folder)
    assert done.returncode == 0, done.stderr
    head, line = done.stdout.replace("seconds left", "seconds_left").splitlines()
    return dict(zip(head.split(), line.replace("running ", "running:").split(), strict=True))


def test_a_killed_worker_is_replaced_by_the_others(cluster: Cluster, text: list[str], folder: Path) -> None:
    """In the same attempt. Meanwhile and afterwards the status tells how far it is."""
    run = submit(cluster, text, folder, cluster.only(1, 2))
    with standing(run, folder) as workers:
        assert len(workers) == 4
        before, shown = written(folder), status(cluster, folder)
        assert shown["state"].startswith("running:node[1-2]")
        assert (shown["attempt"], shown["phase"], shown["rejects"]) == ("1", "prepare", "2")
        done, slices = map(int, shown["slices"].split("/"))
        assert done == len(before) < slices
        assert float(shown["tokens/s"].replace(",", "")) > 0
        assert float(shown["seconds_left"].replace(",", "")) >= 0
        os.kill(workers[0], signal.SIGKILL)
    finish(run, folder, text, attempts=1)
    shown = status(cluster, folder)
    assert (shown["state"], shown["phase"]) == ("finished", "done")
    assert (shown["slices"], shown["rejects"]) == (f"{slices}/{slices}", "2")
    assert "preparing on node1 node2" in run.log
    log = cluster.python("slurm.logs", "runs/t-prepare", "1", cwd=folder).stdout
    assert "prepared: " in log, "each worker has a log"


@pytest.mark.slow  # three minutes: SLURM notices after 30 s, and its claims end after 120 s
def test_a_node_that_dies_whole(cluster: Cluster, text: list[str], folder: Path) -> None:
    """SLURM queues the job again, which goes on with what is done."""
    run = submit(cluster, text, folder, cluster.only(5, 6, 7))
    with standing(run, folder) as workers:
        before = {name: os.stat(folder / "prepared/slices" / name).st_ino for name in written(folder)}
        cluster.kill_node(6)
        run.wait(lambda run: not set(workers) & set(run.ranks()))  # SLURM has noticed
    finish(run, folder, text, attempts=2)
    now = {name: os.stat(folder / "prepared/slices" / name).st_ino for name in before}
    assert now == before
    Cluster.start(cluster.data)


@pytest.mark.parametrize("how", ["scancel", "stop"])
def test_it_is_stopped_and_goes_on(cluster: Cluster, text: list[str], folder: Path, how: str) -> None:
    run = submit(cluster, text, folder, cluster.only(1, 2))
    with standing(run, folder):
        command = ["scancel", run.jobs[0]]
        if how == "stop":
            assert cluster.python("slurm.stop", "runs/t-prepare", cwd=folder).returncode == 0
        else:
            assert cluster.run(*command).returncode == 0
    run.wait(lambda run: cluster.state(run.jobs[0]) in ("COMPLETED", "CANCELLED"))
    assert run.state == {"state": "stopped", "attempt": 1}, run.log
    assert cluster.python("slurm.resume", "runs/t-prepare", cwd=folder).returncode == 0
    finish(run, folder, text, attempts=2)


def test_an_error_of_one_worker_ends_all(cluster: Cluster, text: list[str], folder: Path) -> None:
    """One worker meets a bad row while the others work; the job has failed, though they were only stopped."""
    run = submit(cluster, text, folder, "data.on_bad_row=error")
    run.wait(lambda run: cluster.state(run.jobs[0]) == "FAILED")
    assert run.log.count("is bad (json") == 1
    assert "Exited with exit code 2" in run.log, "srun ends the others"
    assert "Traceback" not in run.log
    assert run.state == {"state": "failed", "attempt": 1}


def test_a_bad_source_ends_all_workers_once(cluster: Cluster, text: list[str], folder: Path) -> None:
    """The message is in the log, the job is not queued again; corrected, it goes on."""
    run = submit(cluster, text, folder, "data.max_bad_fraction=0")
    run.wait(lambda run: cluster.state(run.jobs[0]) == "FAILED")
    assert run.log.count("more than data.max_bad_fraction=0.0 allows") == 2, "of two sources"
    assert "giving up: the preparation failed" in run.log
    assert "Traceback" not in run.log
    assert (run.state["state"], len(run.jobs)) == ("failed", 1)
    assert "the preparation failed" in cluster.python("slurm.status", "runs/t-prepare", cwd=folder).stdout
    finish(submit(cluster, text, folder, "data.max_bad_fraction=0.05"), folder, text, attempts=2)


def test_nodes_must_see_the_folder(cluster: Cluster, text: list[str], folder: Path) -> None:
    """Here it disappears between the submission and the start."""
    run = submit(cluster, text, folder, "+slurm.sbatch.hold=true")
    shutil.rmtree(folder / "prepared")
    assert cluster.run("scontrol", "release", run.jobs[0]).returncode == 0
    run.wait(lambda run: cluster.state(run.jobs[0]) == "FAILED")
    assert "does not see this preparation; use a folder on a file system that all nodes" in run.log
    assert not (folder / "prepared").exists()


def test_mistakes_queue_nothing(cluster: Cluster, text: list[str], folder: Path) -> None:
    def refusal(*overrides: str, first: str = "name=t") -> str:
        command = [first, *SMALL, *text, "job=prepare", "name=t", f"data.dir={folder}/prepared", *overrides]
        done = cluster.python("slurm", *command, cwd=folder)
        assert done.returncode == 2, done.stdout
        return done.stderr

    assert "job=prepare uses no GPU" in refusal("slurm.gpus_per_node=1")
    assert "data.num_workers=0 is less than 1" in refusal("data.num_workers=0")
    assert "job=prepare prepares one folder, without -m" in refusal("data.on_bad_row=skip,error", first="-m")
    (folder / "prepared").mkdir()
    (folder / "prepared/thesis.tex").touch()
    assert "holds other files" in refusal()
    (folder / "prepared/thesis.tex").unlink()
    assert not list(folder.rglob("jobs"))
    submit(cluster, text, folder, "+slurm.sbatch.hold=true")
    assert "is in the queue as job" in refusal()
    assert cluster.run("scancel", *Run(cluster, folder / "runs/t-prepare").jobs).returncode == 0
    moved = refusal(f"data.dir={folder}/elsewhere")
    assert "data.dir: folder" in moved
    assert "choose another name" in moved
