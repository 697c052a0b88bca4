"""Ranks are started, asked to stop, and leave the run folder as they should."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.launch import STOP_SIGNALS
from trainer.run_folder import freeze

WAITS = """
import sys, time
from trainer.launch import StopRequest
stop, deadline = StopRequest(), time.monotonic() + 20
while not stop.requested and time.monotonic() < deadline:
    time.sleep(0.05)
sys.exit(0 if stop.requested else 3)
"""
INTERRUPTED = """
import os, signal, subprocess, sys
from pathlib import Path
from trainer.launch import launch
start = subprocess.Popen

def interrupted(*arguments, **settings):
    os.kill(os.getpid(), signal.SIGINT)
    subprocess.Popen = start
    return start(*arguments, **settings)

subprocess.Popen = interrupted
code = launch(Path("."), 2, os.open(".", os.O_RDONLY), ("waits",))
sys.exit(code if signal.getsignal(signal.SIGINT) is signal.default_int_handler else 4)
"""


def python(code: str, cwd: Path, repository: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": f"{repository}{os.pathsep}{cwd}"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_an_interrupt_before_the_first_rank_is_there_reaches_all_ranks(tmp_path, repository):
    (tmp_path / "waits.py").write_text(WAITS)
    done = python(INTERRUPTED, tmp_path, repository)
    assert done.returncode == 0, done.stderr


def test_only_a_run_that_fails_is_said_to_have_failed(tmp_path, repository):
    """Not a run of which something else, such as a profile, fails here while it goes on elsewhere."""
    state = {"state": "running", "attempt": 3}
    (tmp_path / "state").write_text(json.dumps(state))
    code = "import os; from pathlib import Path; from trainer.launch import launch; "
    code += "assert launch(Path('.'), 1, os.open('.', os.O_RDONLY), ('no_such_module',)) == 1"
    done = python(code, tmp_path, repository)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "state").read_text()) == state


def test_a_rank_that_was_killed_is_named(tmp_path, repository):
    (tmp_path / "killed.py").write_text("import os\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\n")
    code = "import os; from pathlib import Path; from trainer.launch import launch; "
    code += "assert launch(Path('.'), 2, os.open('.', os.O_RDONLY), ('killed',)) == 1"
    done = python(code, tmp_path, repository)
    assert done.returncode == 0, done.stderr
    assert "rank 1 was killed: by a second stop signal, or by the kernel" in done.stderr


def rank(module: str, run_dir: Path, world_size: int) -> subprocess.Popen[str]:
    """A rank as the launcher starts it: with stop signals held back."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    return subprocess.Popen(
        [sys.executable, "-m", module, str(run_dir)],
        env={**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29399"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS),
    )


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_profile_ends_at_the_first_stop_signal(tmp_path, number):
    with rank("trainer.profile", tmp_path, world_size=2) as process:  # it would wait for the other
        process.send_signal(number)
        try:
            assert process.wait(timeout=30) == -number
        finally:
            process.kill()


OUT_OF_MEMORY = """
import sys, torch
import trainer.train
from trainer.run import main

def train(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

trainer.train.train = train
sys.exit(main(["."]))
"""


def test_a_gpu_without_memory_is_told_with_what_helps(tmp_path, composed, repository, monkeypatch):
    freeze(tmp_path, composed("experiment=demo", "parallel.ep_size=1"), [])
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for key, value in (place | {"MASTER_PORT": "29398"}).items():
        monkeypatch.setenv(key, value)
    done = python(OUT_OF_MEMORY, tmp_path, repository)
    assert done.returncode == 1
    assert "rank 0: CUDA out of memory. Tried to allocate 2.00 GiB.\nGo on with less at a time" in done.stdout
    assert all(what in done.stdout for what in ("recompute=full", "micro_batch_size", "deepspeed=zero3"))
    assert "Traceback" not in done.stdout
    assert "Traceback" in (tmp_path / "logs/attempt-1/rank-0.log").read_text()
    assert json.loads((tmp_path / "state").read_text()) == {"state": "failed", "attempt": 1}


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_state_that_cannot_be_read_is_the_users_to_mend(tmp_path, composed, content):
    freeze(tmp_path, composed("experiment=demo"), [])
    (tmp_path / "state").write_text(content)
    with rank("trainer.run", tmp_path, world_size=2) as process:
        try:
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 2
    assert "state cannot be read" in said
    assert "delete it, attempts count from 1 again" in said
    assert "Traceback" not in said
