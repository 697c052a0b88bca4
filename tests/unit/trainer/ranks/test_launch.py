"""Starting and stopping ranks, and the files that they leave in the run folder."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.ranks import launch
from trainer.ranks.launch import STOP_SIGNALS, sees_gpu
from trainer.settings.run_folder import freeze

WAITS = """
import sys, time
from trainer.ranks.launch import StopRequest
stop, deadline = StopRequest(), time.monotonic() + 20
while not stop.requested and time.monotonic() < deadline:
    time.sleep(0.05)
sys.exit(0 if stop.requested else 3)
"""
INTERRUPTED = """
import os, signal, subprocess, sys
from pathlib import Path
from trainer.ranks.launch import launch
start = subprocess.Popen

def interrupted(*arguments, **settings):
    os.kill(os.getpid(), signal.SIGINT)
    subprocess.Popen = start
    return start(*arguments, **settings)

subprocess.Popen = interrupted
code = launch(["waits"], 2, "cpu", os.open(".", os.O_RDONLY))
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


@pytest.mark.parametrize(
    ("device", "visible", "found"),
    [
        ("auto", None, True),
        ("auto", "0,1", True),
        ("cuda", "GPU-5fd4", True),
        ("cpu", None, False),
        ("auto", "", False),
        ("auto", "-1", False),
        ("auto", "NoDevFiles", False),
    ],
)
def test_whether_a_run_finds_a_gpu(device, visible, found, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (tmp_path / "nvidiactl").touch()  # a driver without a GPU
    assert not sees_gpu(device)
    (tmp_path / "nvidia0").touch()
    assert sees_gpu(device) is found


@pytest.mark.parametrize("gpu", [False, True])
def test_what_ranks_are_started_with(gpu, tmp_path, repository, monkeypatch):
    """malloc settings on a CPU, settings of torch's allocator on a GPU, and a thread per usable CPU."""
    (tmp_path / "dev").mkdir()
    if gpu:
        (tmp_path / "dev/nvidia0").touch()
    for key in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(key, raising=False)
    (tmp_path / "tells.py").write_text("import json, os\nprint(json.dumps(dict(os.environ)))\n")
    code = "import os; from pathlib import Path; from trainer.ranks import launch; "
    code += "os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1]); os.cpu_count = lambda: 64; "
    code += "launch._DEVICES = Path('dev'); fd = os.open('.', os.O_RDONLY); "
    code += "assert launch.launch(['tells'], 1, 'auto', fd) == 0"
    done = python(code, tmp_path, repository)
    assert done.returncode == 0, done.stderr
    environment = json.loads(done.stdout)
    assert environment["OMP_NUM_THREADS"] == "1"
    for key in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        assert (key in environment) is not gpu, key
    assert environment.get("PYTORCH_ALLOC_CONF") == ("expandable_segments:True" if gpu else None)


RECORDED = """
import os, sys
from pathlib import Path
import trainer.train
from trainer.run import main

def train(*arguments):
    record = Path(os.environ["TORCH_FR_DUMP_TEMP_FILE"])
    assert record.is_absolute() and record.parent.is_dir(), record
    record.with_name(record.name + "0").touch()
    return "stopped"

trainer.train.train = train
sys.exit(main(["."]))
"""


def test_what_nccl_did_when_it_timed_out_lies_beside_the_logs(tmp_path, composed, repository, monkeypatch):
    freeze(tmp_path, composed("experiment=demo", "parallel.ep_size=1"), [])
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for key, value in (place | {"MASTER_PORT": "29397"}).items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE", raising=False)
    done = python(RECORDED, tmp_path, repository)
    assert done.returncode == 0, done.stdout + done.stderr
    logs = {path.name for path in (tmp_path / "logs/attempt-1").iterdir()}
    assert logs == {"rank-0.log", "nccl-rank-0"}


def test_only_a_run_that_fails_is_said_to_have_failed(tmp_path, repository):
    """If another command, such as a profile, fails while the run continues elsewhere, the state stays."""
    state = {"state": "running", "attempt": 3}
    (tmp_path / "state").write_text(json.dumps(state))
    code = "import os; from pathlib import Path; from trainer.ranks.launch import launch; "
    code += "assert launch(['no_such_module'], 1, 'cpu', os.open('.', os.O_RDONLY)) == 1"
    done = python(code, tmp_path, repository)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "state").read_text()) == state


def test_a_rank_that_was_killed_is_named(tmp_path, repository):
    (tmp_path / "killed.py").write_text("import os\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\n")
    code = "import os; from pathlib import Path; from trainer.ranks.launch import launch; "
    code += "assert launch(['killed'], 2, 'cpu', os.open('.', os.O_RDONLY)) == 1"
    done = python(code, tmp_path, repository)
    assert done.returncode == 0, done.stderr
    assert "rank 1 was killed: by a second stop signal, or by the kernel" in done.stderr


def rank(module: str, run_dir: Path, world_size: int) -> subprocess.Popen[str]:
    """A rank as the launcher starts it: with stop signals blocked."""
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
    with rank("trainer.profile", tmp_path, world_size=2) as process:  # it waits for the other rank
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
    assert "rank 0: CUDA out of memory. Tried to allocate 2.00 GiB.\nContinue with less memory" in done.stdout
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
