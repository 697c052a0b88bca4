"""Steps of a preparation are done once each, and again where a process has ended, whatever others do."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from commands import contents

from data_pipeline import claims
from data_pipeline.claims import Step, do, open_folder, take_part
from data_pipeline.config import DataConfig, DataError, SourceConfig
from data_pipeline.prepare import prepare

VOCAB_SIZE, SEED = 512, 7

ELSEWHERE = "othernode 5a0f pid:[4026531836] 17 4711"  # a process of which this machine knows nothing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    open_folder(tmp_path / "data")
    return tmp_path / "data"


def record(folder: Path, name: str) -> int:
    """An act that tells in `log` who did it."""
    with open(folder / "log", "a") as log:
        log.write(f"{name} {os.getpid()}\n")
    (folder / name).touch()
    return 1


def steps(folder: Path, number: int) -> list[Step]:
    return [Step(f"s-{i}", folder / f"s-{i}", partial(record, folder, f"s-{i}")) for i in range(number)]


def claims_of(folder: Path) -> Path:
    return folder / "survey" / "claims"


def share(folder: Path, number: int, start: Barrier) -> None:
    start.wait(60)
    assert sum(take_part(folder, steps(folder, number))) > 0, "each gets some"


def test_processes_share_the_steps(folder: Path) -> None:
    """Each step is done by exactly one of four processes that want them in the same order."""
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(4)
    workers = [fork.Process(target=share, args=(folder, 200, start)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    done = [line.split()[0] for line in (folder / "log").read_text().splitlines()]
    assert sorted(done) == sorted(f"s-{i}" for i in range(200))


def test_the_claim_of_a_killed_process_is_taken_at_once(folder: Path) -> None:
    [step] = steps(folder, 1)
    code = "import sys, time; from pathlib import Path; from data_pipeline.claims import Step, do\n"
    code += "do(Path(sys.argv[1]), Step('s-0', Path(sys.argv[2]), lambda: time.sleep(600)))"
    arguments = [sys.executable, "-c", code, str(claims_of(folder)), str(step.result)]
    other = subprocess.Popen(arguments)
    while not (claims_of(folder) / "s-0.0").exists():
        time.sleep(0.01)
    assert do(claims_of(folder), step) is None
    assert do(claims_of(folder), step) is None
    other.kill()
    while Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert do(claims_of(folder), step) == 1, "it is not even waited for"
    other.wait()
    assert sorted(os.listdir(claims_of(folder))) == ["s-0.0", "s-0.1"]


def test_a_number_of_a_process_may_be_used_again(folder: Path) -> None:
    [step] = steps(folder, 1)
    (claims_of(folder) / "s-0.0").write_text(f"{claims._machine()} {os.getpid()} 1")  # began at another time
    assert do(claims_of(folder), step) == 1


def test_a_claim_of_another_machine_ends_when_it_stands_still(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the clocks say: only changes count. A claim that beats is never taken."""
    [step] = steps(folder, 1)
    monkeypatch.setattr(claims, "STALE_SECONDS", 0.3)
    claim = claims_of(folder) / "s-0.0"
    claim.write_text(ELSEWHERE)
    for beat in range(8):
        os.utime(claim, (1000 + beat, 1000 + beat))  # an old time by the clock of this machine
        assert do(claims_of(folder), step) is None
        time.sleep(0.1)
    time.sleep(0.4)
    assert do(claims_of(folder), step) == 1


def test_the_newest_claim_counts(folder: Path) -> None:
    """Its process has taken the step over from those before."""
    [step] = steps(folder, 1)
    for number in range(2):
        (claims_of(folder) / f"s-0.{number}").write_text(ELSEWHERE)
    os.utime(claims_of(folder) / "s-0.0", (0, 0))
    assert do(claims_of(folder), step) is None
    os.utime(claims_of(folder) / "s-0.1", (0, 0))
    assert do(claims_of(folder), step) == 1


def test_a_process_at_work_touches_its_claim(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.02)
    claim, times = claims_of(folder) / "s-0.0", set()

    def act() -> None:
        for _ in range(20):
            times.add(claim.stat().st_mtime_ns)
            time.sleep(0.02)

    do(claims_of(folder), Step("s-0", folder / "s-0", act))
    assert len(times) > 5


@pytest.mark.parametrize("error", [DataError("a bad source"), OSError("disk full"), KeyboardInterrupt()])
def test_an_error_gives_the_claim_back(folder: Path, error: BaseException) -> None:
    def fail() -> None:
        raise error

    [step] = steps(folder, 1)
    with pytest.raises(type(error)):
        do(claims_of(folder), replace(step, act=fail))
    assert do(claims_of(folder), step) == 1


def test_an_error_of_a_slow_process_means_nothing(folder: Path) -> None:
    """While it stood still, another process took the step and removed what this one was writing."""
    [step] = steps(folder, 1)

    def stand_still() -> None:
        (claims_of(folder) / "s-0.1").write_text(ELSEWHERE)
        raise FileNotFoundError("the file that it was writing")

    assert do(claims_of(folder), replace(step, act=stand_still)) is None


def test_a_step_that_was_finished_meanwhile_is_not_done_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [step] = steps(folder, 1)
    make = claims._make

    def finish_first(claim: Path) -> bool:
        step.result.touch()
        return make(claim)

    monkeypatch.setattr(claims, "_make", finish_first)
    assert do(claims_of(folder), step) is None
    assert not (folder / "log").exists()


def test_the_answer_to_a_link_may_be_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS then repeats the request, and says that the name exists."""
    [step] = steps(folder, 1)
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(claims.os, "link", twice)
    assert do(claims_of(folder), step) == 1


def small(config: DataConfig, folder: Path, tokenizer: str) -> DataConfig:
    """Two sources of two slices each, with a bad row and a repeated one."""
    rows = [b'{"text": "row %d of some text"}' % (i % 17) for i in range(20)]
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_bytes(b"\n".join([*rows, b"bad", *rows[:3]]))
    sources = {name: SourceConfig("jsonl", [f"{folder}/{name}.jsonl"]) for name in ("a", "b")}
    return replace(config, sources=sources, slice_bytes=500, tokenizer=tokenizer, tokenizer_vocab_size=None)


# Prepare, but be killed when the K-th thing is to be made safe on the disk, or the K-th claim made.
KILLED = """
import os, pickle, sys
from data_pipeline import claims, manifest, slices
from data_pipeline.prepare import prepare
config = pickle.loads(bytes.fromhex(sys.argv[1]))
os.fsync = lambda file: None  # the machine lives on

def deadly(module, name, left):
    act = getattr(module, name)
    def instead(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), 9)
        return act(*args, **kwargs)
    setattr(module, name, instead)

def run(kill, folder):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        left = [kill]
        for module, name in ((manifest, "sync"), (slices, "sync"), (claims, "_make")):
            deadly(module, name, left)
        config.dir = folder
        prepare(config, 512, 7)
        os._exit(0)
    return os.waitpid(child, 0)[1]

folder, kill = config.dir, 1
while run(kill, f"{folder}-{kill}") == 9:
    assert run(-1, f"{folder}-{kill}") == 0, kill
    kill += 1
print(kill)
"""


def test_killed_between_any_two_steps(data_config: DataConfig, prepared: DataConfig, tmp_path: Path) -> None:
    """At each place where something becomes visible to others; another process goes on to the same bytes."""
    config = small(data_config, tmp_path, prepared.dir)
    code = [sys.executable, "-c", KILLED, pickle.dumps(config).hex()]
    done = subprocess.run(code, capture_output=True, text=True, timeout=110, check=True)
    undisturbed = replace(config, dir=str(tmp_path / "undisturbed"))
    prepare(undisturbed, VOCAB_SIZE, SEED)
    expected = contents(undisturbed.dir)
    places = int(done.stdout)
    assert places > 40
    for kill in range(1, places + 1):
        assert contents(f"{config.dir}-{kill}") == expected, kill


# Prepare as if on a machine of its own, where dead processes are known by their silence only.
ON_A_MACHINE = """
import pickle, sys
from data_pipeline import claims
from data_pipeline.prepare import prepare
claims._machine = lambda: f"node{sys.argv[2]} boot pids"
claims.BEAT_SECONDS, claims.STALE_SECONDS = 0.1, 1.0
prepare(pickle.loads(bytes.fromhex(sys.argv[1])), 512, 7, begin=float(sys.argv[2]))
"""


@pytest.fixture
def on_machine(data_config: DataConfig) -> Callable[[float], subprocess.Popen[str]]:
    """`on_machine(n)` starts a process that prepares as if it was on machine n."""

    def start(machine: float) -> subprocess.Popen[str]:
        code = [sys.executable, "-c", ON_A_MACHINE, pickle.dumps(data_config).hex(), str(machine)]
        return subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def expected(config: DataConfig, tmp_path: Path) -> dict[str, bytes]:
    alone = replace(config, dir=str(tmp_path / "alone"))
    prepare(alone, VOCAB_SIZE, SEED)
    return contents(alone.dir)


def test_machines_prepare_one_folder(data_config: DataConfig, tmp_path: Path, on_machine) -> None:
    workers = [on_machine(machine) for machine in (0, 0.5, 0.9)]
    for worker in workers:
        said, _ = worker.communicate(timeout=100)
        assert worker.returncode == 0, said
        assert "prepared: " in said
    assert contents(data_config.dir) == expected(data_config, tmp_path)
    assert not list(Path(data_config.dir).rglob(".*"))


@pytest.mark.parametrize("phase", ["survey", "slices"])
def test_a_slow_worker_that_comes_back_damages_nothing(
    data_config: DataConfig, tmp_path: Path, on_machine, phase: str
) -> None:
    """It stands still in the middle of a slice; another machine does everything; then it goes on."""
    data_config.slice_bytes = 3000
    slow = on_machine(0)
    folder = Path(data_config.dir)
    while not list((folder / phase).glob("letters-*")):
        time.sleep(0.001)
    slow.send_signal(signal.SIGSTOP)
    quick = on_machine(0.5)
    said, _ = quick.communicate(timeout=100)
    assert quick.returncode == 0, said
    before = contents(folder)
    slow.send_signal(signal.SIGCONT)
    said, _ = slow.communicate(timeout=100)
    assert slow.returncode == 0, said
    assert contents(folder) == before == expected(data_config, tmp_path)
    assert not (folder / "survey").exists()
    assert not list(folder.rglob(".*"))
