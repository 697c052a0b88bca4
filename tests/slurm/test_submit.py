"""Submitting on a real cluster: what is queued, what is refused, and that a refusal queues nothing."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import NODES, Cluster, Run

Submit = Callable[..., Run]


@pytest.fixture
def held(cluster: Cluster, folder: Path) -> Iterator[Submit]:
    """`held(name, ...)` submits a run that stays in the queue; all jobs are cancelled after the test."""
    yield lambda name, *overrides: cluster.submit(folder, name, *overrides, "+slurm.sbatch.hold=true")
    jobs = {job for path in folder.rglob("jobs") for job in path.read_text().split()}
    if jobs:
        cluster.run("scancel", *jobs)


def queued(cluster: Cluster) -> set[str]:
    """The ids of all jobs that wait or run."""
    done = cluster.run("squeue", "-h", "-o", "%i")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_every_flag_reaches_slurm(cluster, held, folder):
    """Typed keys, other flags of sbatch, and a name with characters that are special to a shell or sbatch."""
    name = """it's; $(touch oh-no) %j "q" #"""
    quoted = name.replace("'", "\\'")
    flags = ["slurm.partition=lowpri", "slurm.time='2:03:00'", "slurm.mem=123", "slurm.cpus_per_task=2"]
    flags += ["slurm.exclude=node9", "slurm.switches='1@5'", "slurm.gpus_per_node=1", "slurm.exclusive=true"]
    flags += ["+slurm.sbatch.comment='a \"b\" # c'", "+slurm.sbatch.nice=5", "+slurm.sbatch.mail_type=END"]
    held(f"'{quoted}'", *flags)
    run = Run(cluster, folder / "runs" / name)
    (job,) = run.jobs
    shown = cluster.run("scontrol", "show", "job", job).stdout
    for expected in (
        f"JobName={name}",
        "Partition=lowpri",
        "TimeLimit=02:03:00",
        "MinMemoryNode=123M",
        "CPUs/Task=2",
        "ExcNodeList=node9",
        "Switches=1@00:05:00",
        "TresPerNode=gres:gpu:1",
        'Comment=a "b" # c',
        "Requeue=1",
        f"Command={run.folder}/job.sh",
    ):
        assert expected in shown, (expected, shown)
    # the script can run under that name: it writes its log, and exits early because of the stop file
    (run.folder / "stop").write_text("by the test\n")
    assert cluster.run("scontrol", "release", job).returncode == 0
    run.wait(lambda run: "not started: by the test" in run.log)
    assert not list(folder.rglob("oh-no"))
    shellcheck = [str(Path(sys.executable).parent / "shellcheck"), "--severity=warning"]
    checked = cluster.run(*shellcheck, str(run.folder / "job.sh"))
    assert checked.returncode == 0, checked.stdout


def test_the_folder_is_frozen(cluster, held, repository):
    run = held("frozen")
    assert (run.folder / "code/trainer/train.py").read_text() == (repository / "trainer/train.py").read_text()
    assert "slurm" not in (run.folder / "config.yaml").read_text()
    assert "slurm.nodes=2" in (run.folder / "overrides.txt").read_text()
    subprocess.run(["bash", "-n", run.folder / "job.sh"], check=True)


def test_a_login_node_does_it_without_torch_in_two_seconds(cluster, submit_command, folder):
    """Measured in processor time, because a busy test machine makes wall time meaningless."""
    code = (
        "import sys, resource, runpy\n"
        "try:\n    runpy.run_module('slurm', run_name='__main__')\n"
        "finally:\n    used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "    print('torch' in sys.modules, used.ru_utime + used.ru_stime, file=sys.stderr)"
    )
    done = cluster.run(
        sys.executable, "-c", code, *submit_command[1:], "name=dry", "slurm.dry_run=true", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    torch, seconds = done.stderr.split()[-2:]
    assert torch == "False"
    assert float(seconds) < 2
    assert "#SBATCH --nodes=2" in done.stdout
    assert not (folder / "runs").exists(), "a dry run must write nothing"


def mistake(cluster: Cluster, folder: Path, command: list[str], *overrides: str) -> str:
    """The message of a submission that must be refused, with nothing queued."""
    before = queued(cluster)
    done = cluster.python(*command, *overrides, cwd=folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert queued(cluster) <= before, "something is queued"
    assert not list(folder.rglob("jobs"))
    return done.stderr


TOO_MANY_GPUS = ["slurm.nodes=1", "slurm.gpus_per_node=9", "parallel.nproc_per_node=9"]
TOO_MANY_GPUS += ["parallel.ep_size=1", "stage.global_batch_size=18"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["slurm.partition=nowhere"], "invalid partition"),
        (TOO_MANY_GPUS, "sbatch refuses: sbatch: error:"),
        (["device=cuda"], "slurm.gpus_per_node=0 but device=cuda: no node would give a GPU"),
        (
            ["device=cpu", "slurm.gpus_per_node=1"],
            "slurm.gpus_per_node=1 but device=cpu: the GPUs",
        ),
        (["slurm.gpus_per_node=4"], "slurm.gpus_per_node=4 but parallel.nproc_per_node=1"),
        ([f"slurm.nodes={NODES + 2}", "stage.global_batch_size=64"], "sbatch refuses: sbatch: error:"),
        (["slurm.nodes=3"], "parallel.ep_size=2 does not divide the 3 ranks"),
        (["slurm.nodes=8", "parallel.ep_size=1"], "stage.global_batch_size=8 is not a multiple of 8 ranks"),
        (["slurm.nods=3"], "slurm.nods"),
        (["slurm=nowhere"], "nowhere"),
        (["output_dir=/proc/nothing"], "cannot write the run folder"),
        (["+slurm.sbatch.signal=1"], "slurm.sbatch.signal is set by slurm.stop_before_seconds"),
        (["+slurm.sbatch.no_such_flag=1"], "sbatch: unrecognized option '--no-such-flag"),
        (["+slurm.env.WANDB_API_KEY=1"], "slurm.env.WANDB_API_KEY looks like a secret"),
        (["slurm.container.kind=pyxis"], "needs slurm.container.image"),
        (["data.dir=nowhere"], "run python -m data_pipeline"),
        (["slurm.resume=never", "slurm.nodes=0"], "slurm.nodes=0 is below 1"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_mistakes_exit_with_2_and_queue_nothing(cluster, submit_command, folder, overrides, message):
    assert message in mistake(cluster, folder, submit_command, "name=a", *overrides)


def test_no_sbatch_on_the_path(cluster, submit_command, folder):
    bare = Cluster({**cluster.environment, "PATH": "/nowhere"}, cluster.data)
    done = bare.python(*submit_command, "name=a", cwd=folder)
    assert done.returncode == 2
    assert "sbatch is not on the PATH" in done.stderr
    assert not (folder / "runs").exists()


def test_a_name_is_used_once(cluster, held, submit_command, folder):
    run = held("twice")
    again = cluster.python(*submit_command, "name=twice", cwd=folder)
    assert again.returncode == 2
    assert f"is in the queue as job {run.jobs[0]} (PENDING)" in again.stderr
    other = cluster.python(*submit_command, "name=twice", "optimizer.lr=0.5", cwd=folder)
    assert other.returncode == 2
    resumed = cluster.python("slurm.resume", "runs/twice", cwd=folder)
    assert "is in the queue" in resumed.stderr
    cluster.python("slurm.stop", "runs/twice", cwd=folder)
    other = cluster.python(*submit_command, "name=twice", "optimizer.lr=0.5", cwd=folder)
    assert "optimizer.lr: folder 0.0003, now 0.5" in other.stderr
    assert len(run.jobs) == 1
    assert "stopped by slurm.stop" in cluster.python("slurm.status", "runs/twice", cwd=folder).stdout
    (run.folder / "code/trainer/mark").write_text("of the first submission")
    held("twice", "slurm.time=10")
    assert len(run.jobs) == 2, "the same configuration can be submitted again"
    assert not (run.folder / "stop").exists()
    assert (run.folder / "code/trainer/mark").exists(), "the run must keep its first code"


def test_a_sweep_is_checked_as_a_whole_and_is_one_array(cluster, held, submit_command, folder):
    command = ["slurm", "-m", *submit_command[1:], "name=sweep"]
    message = mistake(cluster, folder, command, "parallel.ep_size=2,3", "optimizer.lr=1e-3,-1")
    assert "point 1" in message
    assert "point 2" in message
    assert "optimizer.lr=-1" in message
    assert message.count("does not divide") >= 2
    assert "the same for all points" in mistake(cluster, folder, command, "slurm.nodes=2,4")

    sweep = held("sweep", "-m", "optimizer.lr=1e-3,3e-3", "parallel.ep_size=1,2", "slurm.max_parallel=2")
    points = json.loads((sweep.folder / "sweep.json").read_text())
    assert {"optimizer.lr=0.003", "parallel.ep_size=2"} <= set(points[3])
    jobs = [(sweep.folder / str(i) / "jobs").read_text().strip() for i in range(4)]
    array = jobs[0].split("_")[0]
    assert jobs == [f"{array}_{i}" for i in range(4)]
    assert "ArrayTaskId=0-3%2" in cluster.run("scontrol", "show", "job", array).stdout
    assert sorted(path.name for path in sweep.folder.iterdir() if path.is_dir()) == [
        "0",
        "1",
        "2",
        "3",
        "code",
    ]
    assert not list(folder.glob("multirun*")), "Hydra must leave no files"
    shown = cluster.python("slurm.status", "runs/sweep", cwd=folder).stdout
    assert shown.count("pending") == 4
    assert (
        "parallel.ep_size=2 optimizer.lr=0.003" in shown or "optimizer.lr=0.003 parallel.ep_size=2" in shown
    )
    assert "taken from the queue" in cluster.python("slurm.stop", "runs/sweep/2", cwd=folder).stdout
    assert cluster.python("slurm.resume", "runs/sweep/2", cwd=folder).returncode == 0
    assert len((sweep.folder / "2/jobs").read_text().split()) == 2


def test_containers_wrap_only_the_rank_command(cluster, submit_command, folder):
    image = [
        "slurm.container.image='/images/a b.sqsh'",
        "slurm.container.mounts=[/scratch]",
        "slurm.dry_run=true",
    ]
    pyxis = cluster.python(*submit_command, "name=a", *image, "slurm.container.kind=pyxis", cwd=folder).stdout
    assert "SRUN=('--container-image=/images/a b.sqsh'" in pyxis
    assert "/scratch:/scratch" in pyxis
    assert "\nPYTHON=python\n" in pyxis
    assert "WRAP=()" in pyxis


def test_a_run_in_a_container(cluster, submit_command, folder):
    """Apptainer cannot be installed here; a stand-in with the same command line records what runs inside."""
    stand_in = folder / "bin/apptainer"
    stand_in.parent.mkdir()
    to_image = "until [[ $1 = image ]]; do shift; done; shift"
    stand_in.write_text(f'#!/usr/bin/env bash\necho "$@" >>{folder}/said\n{to_image}\nexec "$@"\n')
    stand_in.chmod(0o755)
    container = [
        "slurm.container.kind=apptainer",
        "slurm.container.image=image",
        f"slurm.python={sys.executable}",
    ]
    path = f"slurm.setup=['export PATH={folder}/bin:$PATH']"
    short = ["stage.train_tokens=1024", "schedule.warmup_steps=1"]
    run = cluster.submit(folder, "contained", *container, path, *short, cluster.only(1, 2)).finish(attempts=1)
    said = (folder / "said").read_text().splitlines()
    assert len(said) == 2, "only one command per rank may run in the container"
    assert all(line.endswith(f"image {sys.executable} -m trainer.run {run.folder}") for line in said)
    assert f"--bind={run.folder}" in said[0]


def test_an_image_has_come_to_every_node_before_the_check(cluster, submit_command, folder):
    """A separate step loads the image once per node, not per rank, before the check and the training."""
    stand_in = folder / "bin/apptainer"
    stand_in.parent.mkdir()
    to_image = "until [[ $1 = image ]]; do shift; done; shift 2"
    said = f'echo "$SLURMD_NODENAME $SLURM_STEP_ID $WORLD_SIZE $*" >>{folder}/said'
    stand_in.write_text(f'#!/usr/bin/env bash\n{to_image}\n{said}\nexec {sys.executable} "$@"\n')
    stand_in.chmod(0o755)
    container = ["slurm.container.kind=apptainer", "slurm.container.image=image"]
    container.append(f"slurm.setup=['export PATH={folder}/bin:$PATH']")
    short = ["stage.train_tokens=1024", "schedule.warmup_steps=1", "parallel.nproc_per_node=2"]
    check = ["slurm.health.seconds=240", "slurm.health.min_free_gib=0.01"]
    run = cluster.submit(folder, "warm", *container, *short, *check, cluster.only(1, 2)).finish(attempts=1)
    nodes, ranks = {"node1", "node2"}, ["node1", "node1", "node2", "node2"]
    steps = [line.split(maxsplit=3) for line in (folder / "said").read_text().splitlines()]
    first, second, third = (
        sorted((node, ws, what) for node, at, ws, what in steps if at == step) for step in "012"
    )
    assert first == sorted((node, "2", "-c import torch") for node in nodes)
    assert [node for node, *_ in second] == ranks
    assert all("-m slurm.health" in what for *_, what in second)
    assert [node for node, *_ in third] == ranks
    assert all(f"-m trainer.run {run.folder}" == what for *_, what in third)
    assert "health: node1 node2: well" in run.log


@pytest.mark.parametrize("bound", [False, True], ids=["all GPUs", "one GPU"])
def test_what_a_rank_is_told_of_its_place(cluster, folder, bound):
    """A task that SLURM has bound to one GPU sees it as number 0; Triton's cache is local to the node."""
    stand_in, temporary = folder / "python", folder / "tmp"
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "TRITON_CACHE_DIR")
    told = " ".join(f"${name}" for name in names)
    stand_in.write_text(f'#!/usr/bin/env bash\necho "{told}" >>{folder}/told\nexit 1\n')
    stand_in.chmod(0o755)
    overrides = ["slurm.nodes=1", "slurm.gpus_per_node=3", "parallel.nproc_per_node=3", "parallel.ep_size=1"]
    overrides += ["stage.global_batch_size=6", f"slurm.python={stand_in}", f"+slurm.env.TMPDIR={temporary}"]
    overrides += ["+slurm.sbatch.gpus_per_task=1"] if bound else []
    run = cluster.submit(folder, "place", *overrides, cluster.only(3))
    run.wait(lambda run: "saved nothing new" in run.log)
    cache = f"{temporary}/triton-{run.jobs[0]}"
    ranks = sorted((folder / "told").read_text().splitlines())
    if bound:
        assert ranks == [f"{rank} 0 1 {rank} {cache}" for rank in range(3)]
    else:
        assert ranks == [f"{rank} {rank} 3 0,1,2 {cache}" for rank in range(3)]


def test_logs(cluster, submit_command, folder):
    assert cluster.python("slurm.logs", cwd=folder).returncode == 2
    assert "does not exist" in cluster.python("slurm.logs", "runs/nothing", cwd=folder).stderr
    (folder / "runs/a/logs").mkdir(parents=True)
    (folder / "runs/a/logs/job.log").write_text("said\n")
    assert cluster.python("slurm.logs", "runs/a", cwd=folder).stdout == "said\n"
    assert "no config.yaml" in cluster.python("slurm.status", "runs/a", cwd=folder).stderr
    with subprocess.Popen(
        [sys.executable, "-m", "slurm.logs", "-f", "runs/a"],
        cwd=folder,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as following:
        assert following.stdout.readline() == "said\n"
        with (folder / "runs/a/logs/job.log").open("a") as log:
            log.write("more\n")
        assert following.stdout.readline() == "more\n"
        following.kill()
