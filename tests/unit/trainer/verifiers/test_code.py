"""The verifier that runs programs: what passes, what cheats, and what would harm the machine."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.settings.rl import OPTIONS, VerifierConfig
from trainer.verifiers.code import verify
from trainer.verifiers.process import Part
from trainer.verifiers.scorer import Scorer

ASSERTS = "assert double(2) == 4\nassert double(5) == 10"
SUMS = [{"input": "3 4\n", "output": "7"}, {"input": "1 1", "output": "2\n"}]
RIGHT = "def double(x):\n    return 2 * x\n"
RIGHT_SUM = "print(sum(map(int, input().split())))"


def block(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\n"


def judge(completion: str, tests: Any, **options: Any) -> tuple[float, str]:
    return verify({"tests": tests}, completion, {**OPTIONS["code"], **options})


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (block(RIGHT), 1),
        (RIGHT, 1),
        (block("def double(x): return 0") + block(RIGHT), 1),
        (block(RIGHT) + block("def double(x): return 0"), 0),
        (block(RIGHT) + "```\noutput\n```", 1),
        ("```python\n" + RIGHT, 0),
        (block(RIGHT + "\nif __name__ == '__main__':\n    input()"), 1),
        (block("import numpy\n" + RIGHT), 1),
        (block("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\n" + RIGHT), 1),
        (block(RIGHT + "print('x' * 30_000_000)"), 1),
        (block("# \u0663 \N{SNOWMAN}\n" + RIGHT + "print('\N{SNOWMAN}')"), 1),
        (block("def double(x): return x + 2"), 0),
        (block("def double(x)"), 0),
        (block("\0"), 0),
        (block(""), 0),
        ("", 0),
        ("x" * 1_000_000, 0),
    ],
)
def test_a_program_with_asserts(completion: str, expected: float) -> None:
    assert judge(completion, ASSERTS)[0] == expected


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "print('passed'); print(2); raise SystemExit",
        "import os\ndef double(x): os._exit(0)",
        "import sys\ndef double(x): sys.exit(0)",
        "import os\nfor i in (1, 3): os.write(i, b'0 2 ')\nos._exit(0)",
        "import builtins, os\nbuiltins.exec = os.write = lambda *a: None\ndef double(x): return 0",
        "import builtins\nbuiltins.AssertionError = Warning\ndef double(x): return 0",
        "def double(x): raise KeyboardInterrupt",
        "def double(x): return double(x)",
        "import ctypes\nctypes.string_at(0)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import os\nos.abort()",
    ],
)
def test_a_program_cannot_say_that_it_passed(program: str) -> None:
    assert judge(block(program), ASSERTS)[0] == 0


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (RIGHT_SUM, 1),
        ("print(sum(map(int, open(0).read().split())))", 1),
        ("import threading\nt = threading.Thread(target=lambda: " + RIGHT_SUM + ")\nt.start()", 1),
        ("if __name__ == '__main__':\n    " + RIGHT_SUM, 1),
        (RIGHT_SUM + "\nexit()", 1),
        ("print(sum(map(int, input().split())), ' \\n\\n')", 1),
        ("print(7)", 0),
        (RIGHT_SUM + "\nraise ValueError", 0),
        (RIGHT_SUM + "\nprint(0)", 0),
        (RIGHT_SUM + "\nprint('\\n' * 30_000_000)", 0),
        ("", 0),
    ],
)
def test_a_program_with_input_and_output(program: str, expected: float) -> None:
    assert judge(block(program), SUMS)[0] == expected


@pytest.mark.parametrize(
    "tests",
    [
        json.dumps(SUMS),
        "\n "
        + json.dumps({"inputs": [of["input"] for of in SUMS], "outputs": [of["output"] for of in SUMS]}),
        {"inputs": ["3 4", "1 1"], "outputs": ["7", "2"]},
    ],
)
def test_cases_in_the_forms_of_public_sets(tests: Any) -> None:
    assert judge(block(RIGHT_SUM), tests) == (1, "2 of 2 pass")
    assert judge(block("print(7)"), tests)[0] == 0
    assert judge("", tests)[0] == 0


def test_an_expression_is_a_test_only_with_a_call() -> None:
    texts = f'"""Tests of double."""\n{ASSERTS}\n3'
    assert judge(block("def double(x): return 4"), texts, partial=True)[0] == 0.5
    assert judge(block(RIGHT), "[check for check in [double(2) == 4] if not check and 1 / 0]")[0] == 1


def test_the_share_of_tests_that_pass() -> None:
    assert judge(block("print(7)"), SUMS, partial=True) == (0.5, "test 2: wrong output")
    half = block("def double(x): return 4")
    assert judge(half, ASSERTS, partial=True) == (0.5, "AssertionError:")
    setup = "import math\nbig = double(1)\ndef check(f):\n    assert f(2) == 4\ncheck(double)\n" + ASSERTS
    assert judge(half, setup, partial=True)[0] == pytest.approx(2 / 3)
    assert judge(block("def double(x): return x.y"), setup, partial=True)[0] == 0
    assert judge(block("x ="), ASSERTS, partial=True)[0] == 0
    assert judge(block(RIGHT), "import no_such_module\n" + ASSERTS, partial=True)[0] == 0


@pytest.mark.parametrize(
    ("tests", "error"),
    [
        ("assert (", SyntaxError),
        ("import math", ValueError),
        ("", ValueError),
        ([], ValueError),
        (["x"], ValueError),
        (3, ValueError),
        (None, ValueError),
        ([{"input": ""}], ValueError),
    ],
)
def test_tests_that_are_none_are_an_error(tests: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        judge(block("pass"), tests)


# The lines would do no harm if they were not refused: signal 0 only asks whether a signal may be sent.
def refused(*lines: str) -> str:
    """A program whose double() is right only if its lines raise an error of the system."""
    body = "".join(f"    {line}\n" for line in lines)
    return block(
        f"import os\ntry:\n{body}except (OSError, MemoryError, ValueError):\n    double = lambda x: 2 * x"
    )


@pytest.mark.parametrize(
    "lines",
    [
        ["os.fork()"],
        ["import subprocess", "subprocess.run(['true'])"],
        ["import multiprocessing", "multiprocessing.get_context('fork').Process(target=print).start()"],
        ["os.execv('/bin/true', ['true'])"],
        ["bytearray(2 << 30)"],
        ["with open('huge', 'wb') as file: file.write(bytes(64 << 20))"],
        ["with open('sparse', 'wb') as file: file.truncate(1 << 40)"],
        ["files = [open(f'{i}', 'w') for i in range(1000)]"],
        ["import socket", "socket.create_connection(('127.0.0.1', 9))"],
        ["import socket", "socket.socket(socket.AF_UNIX)"],
        ["os.kill(os.getppid(), 0)"],
        ["os.kill(0, 0)"],
        ["os.killpg(os.getpgid(0), 0)"],
        ["os.kill(-1, 0)"],
        ["os.setsid()"],
        ["os.setpgid(0, 0)"],
        ["open(f'/proc/{os.getppid()}/environ').read()"],
        ["open(f'/proc/{os.getppid()}/mem', 'r+b')"],
        ["import resource", "resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))"],
    ],
    ids=lambda lines: lines[-1][:40],
)
def test_what_the_sandbox_refuses(lines: list[str]) -> None:
    assert judge(refused(*lines), ASSERTS) == (1, "2 of 2 pass")


@pytest.mark.parametrize(
    "what",
    ["open({!r}, 'w')", "open({!r}, 'a')", "os.truncate({!r}, 0)", "os.remove({!r})", "os.rename({!r}, 'x')"],
)
def test_a_program_writes_only_to_its_folder(tmp_path: Path, what: str) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    assert judge(refused(what.format(str(mine))), ASSERTS)[0] == 1
    assert mine.read_text() == "precious"
    own = (
        "assert not os.listdir()\nopen('x', 'w').write('y')\nassert open('x').read() == 'y'\nos.remove('x')\n"
    )
    assert judge(block("import os\n" + own + RIGHT), ASSERTS)[0] == 1
    assert judge(block("import os\nopen(os.devnull, 'w').write('y')\n" + RIGHT), ASSERTS)[0] == 1


def test_a_program_sees_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "secret")
    tests = "import os\nassert set(os.environ) <= {'OMP_NUM_THREADS', 'LC_CTYPE'}"
    assert judge(block("import os"), tests)[0] == 1


def test_a_sandbox_that_cannot_be_set_up_is_an_error() -> None:
    with pytest.raises(OSError, match=f"is memory_mb={1 << 50} right"):
        judge(block(RIGHT), ASSERTS, memory_mb=1 << 50)


def test_threads_are_bounded_by_memory() -> None:
    start = "_thread.start_new_thread(time.sleep, (99,))"
    program = f"import _thread, time\n_thread.stack_size(1 << 15)\nfor _ in range(5000): {start}"
    assert "Error" in judge(block(program), ASSERTS, memory_mb=128)[1]


def test_a_program_may_take_the_memory_that_it_is_given() -> None:
    program = block("x = bytearray(300 << 20)\n" + RIGHT)
    assert judge(program, ASSERTS, memory_mb=512)[0] == 1
    assert judge(program, ASSERTS, memory_mb=256) == (0, "MemoryError:")


def children_of(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            found += (
                [int(path.parent.name)] if int(path.read_text().rpartition(")")[2].split()[1]) == pid else []
            )
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(100)",
        "from signal import *\nfor n in {*Signals} - {9, 19}: signal(n, SIG_IGN)\nwhile True: pass",
        "import threading\ndef loop():\n    while True: pass\nthreading.Thread(target=loop).start()\nloop()",
        "import re\nre.match('(a+)+b', 'a' * 50)",
        "import os\nos.kill(os.getpid(), 19)",
        "import os\nwhile True:\n    os.mkdir('d')\n    os.chdir('d')",
    ],
)
def test_a_program_without_end_is_ended(program: str) -> None:
    scorer = Scorer({"code": VerifierConfig("code", 1.0, 0.5)}, 1)
    try:
        begin = time.monotonic()
        [score] = scorer.score([({"tests": ASSERTS}, block(program))])
        assert score.parts["code"] == Part(0.0, "took longer than 0.5 seconds", True)
        assert time.monotonic() - begin < 10
        assert not [pid for worker in children_of(os.getpid()) for pid in children_of(worker)]
        [score] = scorer.score([({"tests": ASSERTS}, block(RIGHT))])
        assert score.reward == 1
    finally:
        scorer.close()
