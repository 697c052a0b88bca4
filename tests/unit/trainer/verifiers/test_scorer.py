"""The scorer: whatever a verifier does costs one sample, and never the rank."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.settings.rl import VerifierConfig
from trainer.verifiers.process import Part, Worker, exchange
from trainer.verifiers.scorer import Score, Scorer

MINE = """
import json, math, os, signal, subprocess, sys, threading, time

def judge(fields, completion, options):
    exec(fields.get("do", ""))
    return eval(fields.get("give", "1.0"), globals() | locals())

def wide(fields, completion, options):
    return len(completion) / 10_000_000, options["said"]
"""
Make = Callable[..., Scorer]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own verifiers, on the path of modules."""
    (tmp_path / "my_verifiers.py").write_text(MINE)
    (tmp_path / "broken_verifiers.py").write_text("import no_such_module")
    (tmp_path / "deadly_verifiers.py").write_text("import os; os._exit(7)")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def scorer(mine: None) -> Iterator[Make]:
    """`scorer(workers, name=VerifierConfig(...))`, closed at the end."""
    made: list[Scorer] = []

    def make(workers: int, **verifiers: VerifierConfig) -> Scorer:
        made.append(Scorer(verifiers or {"own": VerifierConfig("my_verifiers:judge", 1.0, 1.0)}, workers))
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert workers_of(os.getpid()) == []


def workers_of(pid: int) -> list[int]:
    """The processes in sessions that the children of a process lead."""
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stats.append([int(path.parent.name), *map(int, path.read_text().rpartition(")")[2].split()[1:4])])
        except OSError:
            continue
    leaders = {each for each, parent, _, session in stats if parent == pid and session == each}
    return [each for each, _, _, session in stats if session in leaders]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid: int) -> bool:
    """Whether a process ends within seconds: a signal takes its time."""
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def started_by(scorer: Scorer) -> int:
    """A process that a verifier leaves behind."""
    row = {"give": "1.0, subprocess.Popen(['sleep', '99']).pid"}
    return int(scorer.score([(row, "")])[0].parts["own"].reason)


def test_rewards_are_weighted_and_in_order(scorer: Make) -> None:
    verifiers = {
        "right": VerifierConfig("exact", 3.0),
        "shape": VerifierConfig("format", 1.0, options={"think": "required"}),
        "watched": VerifierConfig("number", 0.0),
    }
    rows = [
        ({"answer": "1"}, "<think></think>1"),
        ({"answer": "2"}, "2<|im_end|>"),
        ({"answer": "3"}, "<think>3</think>4"),
        ({"answer": "5"}, "6"),
    ]
    scores = scorer(2, **verifiers).score(rows)
    assert [score.reward for score in scores] == [1, 0.75, 0.25, 0]
    assert list(scores[0].parts) == ["right", "shape", "watched"]
    assert scores[1].parts["shape"] == Part(0.0, "no thoughts", False)
    assert [score.parts["watched"].reward for score in scores] == [1, 1, 0, 0]


BAD = [
    ("raise KeyError('x')", "1.0", "KeyError: 'x'"),
    ("raise RecursionError", "1.0", "RecursionError: "),
    ("", "float('nan')", "ValueError: the reward nan is outside 0 to 1"),
    ("", "1.5", "ValueError: the reward 1.5 is outside 0 to 1"),
    ("", "-0.1", "ValueError: the reward -0.1 is outside 0 to 1"),
    ("", "None", "TypeError: "),
    ("", "'right'", "ValueError: "),
    ("", "(1.0, 'why', 3)", "ValueError: "),
    ("bytearray(9 << 30)", "1.0", "MemoryError: "),
    ("os._exit(0)", "1.0", "the worker ended during the check"),
    ("sys.exit(0)", "1.0", "the worker ended during the check"),
    ("os.kill(os.getpid(), signal.SIGKILL)", "1.0", "the worker ended during the check"),
    ("os.killpg(0, signal.SIGTERM)", "1.0", "the worker ended during the check"),
    ("os.closerange(0, 99)", "1.0", "the worker ended during the check"),
    ("time.sleep(99)", "1.0", "took longer than 1 seconds"),
    ("os.kill(os.getpid(), signal.SIGSTOP)", "1.0", "took longer than 1 seconds"),
    ("import re; re.match('(a+)+b', 'a' * 50)", "1.0", "took longer than 1 seconds"),
    ("subprocess.Popen(['sleep', '99']).wait()", "1.0", "took longer than 1 seconds"),
    (
        r"[os.write(f, b'{}\n') for f in (3, 4)]",
        "1.0",
        "the worker's answer cannot be read",
    ),
    ("while True: [os.write(f, b'x') for f in (3, 4)]", "1.0", "the worker's answer cannot be read"),
]


@pytest.mark.parametrize(("do", "give", "reason"), BAD, ids=lambda text: text[:30])
def test_what_goes_wrong_costs_the_sample(scorer: Make, do: str, give: str, reason: str) -> None:
    begin = time.monotonic()
    fine, bad, again = scorer(1).score([({}, ""), ({"do": do, "give": give}, ""), ({}, "")])
    assert time.monotonic() - begin < 10
    assert bad.reward == 0
    assert bad.parts["own"].failed
    assert bad.parts["own"].reason.startswith(reason)
    assert fine == again == Score(1.0, {"own": Part(1.0, "", False)})


def test_the_number_of_workers_changes_nothing(scorer: Make) -> None:
    rows: list[tuple[dict[str, Any], str]] = [({"give": f"{i / 50}, 'n{i}'"}, "x" * i) for i in range(50)]
    for place, (do, give, _) in enumerate(BAD[:11]):
        rows.insert(4 * place, ({"do": do, "give": give}, ""))
    one, three = scorer(1).score(rows), scorer(3).score(rows)
    assert one == three
    assert [score.parts["own"].reason for score in one if not score.parts["own"].failed] == [
        f"n{i}" for i in range(50)
    ]


def test_checks_run_at_the_same_time(scorer: Make) -> None:
    rows: list[tuple[dict[str, Any], str]] = [({"do": "time.sleep(1)"}, "")] * 3
    three = scorer(3, own=VerifierConfig("my_verifiers:judge", 1.0))
    three.score([({}, "")] * 3)
    begin = time.monotonic()
    assert [score.reward for score in three.score(rows)] == [1, 1, 1]
    assert time.monotonic() - begin < 2.5


def test_the_time_to_start_and_to_import_does_not_count(scorer: Make, tmp_path: Path) -> None:
    (tmp_path / "slow_verifiers.py").write_text("import time; time.sleep(1)\ndef f(*_): return 1")
    slow = scorer(1, own=VerifierConfig("slow_verifiers:f", 1.0, 0.2))
    assert slow.score([({}, "")])[0].reward == 1


def test_a_module_that_cannot_be_imported(scorer: Make) -> None:
    broken = {
        "a": VerifierConfig("broken_verifiers:f", 1.0),
        "b": VerifierConfig("deadly_verifiers:f", 1.0),
        "c": VerifierConfig("my_verifiers:f", 1.0),
    }
    for score in scorer(2, **broken).score([({}, ""), ({}, "")]):
        reasons = {name: part.reason for name, part in score.parts.items() if part.failed}
        assert reasons["a"].startswith("ModuleNotFoundError: No module named 'no_such_module'")
        assert reasons["b"] == "the worker ended during the check"
        assert reasons["c"].startswith("AttributeError: ")


def test_large_completions_and_odd_text(scorer: Make) -> None:
    wide = scorer(1, wide=VerifierConfig("my_verifiers:wide", 1.0, options={"said": "\ud800\n" * 9999}))
    [score] = wide.score([({}, "\N{SNOWMAN}" * 10_000_000)])
    assert score == Score(1.0, {"wide": Part(1.0, "\ud800\n" * 250, False)})


def test_what_a_verifier_prints_and_reads(scorer: Make) -> None:
    row: dict[str, Any] = {
        "do": "print('{}'); sys.stdout.flush(); os.write(1, b'{}\\n'); assert not sys.stdin.read()"
    }
    assert scorer(1).score([(row, "")])[0].reward == 1


def test_workers_stay_and_dead_ones_are_replaced(scorer: Make) -> None:
    pair = scorer(2)
    assert workers_of(os.getpid()) == []
    assert pair.score([]) == []
    pair.score([({}, "")])
    [first] = workers_of(os.getpid())
    pair.score([({}, "")])
    assert workers_of(os.getpid()) == [first]
    started = started_by(pair)
    os.kill(first, signal.SIGKILL)
    time.sleep(0.2)
    assert pair.score([({}, "")])[0].reward == 1
    assert first not in workers_of(os.getpid())
    assert ends(started)
    pair.close()
    assert workers_of(os.getpid()) == []
    assert pair.score([({}, "")])[0].reward == 1


def test_nothing_is_left_after_close(scorer: Make) -> None:
    one = scorer(1)
    [score] = one.score([({"do": "import tempfile", "give": "1.0, tempfile.mkdtemp()"}, "")])
    folder = Path(score.parts["own"].reason)
    started = started_by(one)
    assert folder.is_dir()
    assert is_running(started)
    one.close()
    assert not folder.parent.exists()
    assert ends(started)
    assert workers_of(os.getpid()) == []


def test_a_worker_that_dies_before_it_reads_its_job(scorer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    one = scorer(1)
    one.score([({}, "")])
    os.kill(workers_of(os.getpid())[0], signal.SIGKILL)
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "is_alive", lambda worker: True)
        [score] = one.score([({}, "x" * 1_000_000)])
    assert score.parts["own"] == Part(0.0, "the worker ended during the check", True)
    assert one.score([({}, "")])[0].reward == 1


def test_an_interrupted_call_leaves_no_answer_to_the_next(
    scorer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = scorer(1)

    def interrupt(busy: list[Worker]) -> None:
        exchange(busy)  # the job is sent
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainer.verifiers.scorer.exchange", interrupt)
        with pytest.raises(KeyboardInterrupt):
            one.score([({"give": "0.25"}, "")])
    assert one.score([({"give": "0.5"}, "")])[0].reward == 0.5


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_rank(mine: None, tmp_path: Path, number: int) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text(f"""
import sys
sys.path[:0] = {sys.path!r}
from trainer.settings.rl import VerifierConfig
from trainer.verifiers.scorer import Scorer
scorer = Scorer({{"own": VerifierConfig("my_verifiers:judge", 1.0, 99.0)}}, 3)
scorer.score([({{}}, "")])
print("ready", flush=True)
scorer.score([({{"do": "import re; re.match('(a+)+b', 'a' * 50)"}}, ""), ({{"do": "time.sleep(99)"}}, "")])
""")
    with subprocess.Popen(
        [sys.executable, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.5)
        workers = workers_of(process.pid)
        assert len(workers) == 2
        process.send_signal(number)
        process.wait(10)
        assert all(ends(pid) for pid in workers)
