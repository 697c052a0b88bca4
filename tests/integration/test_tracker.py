"""The real W&B client: what it writes offline, and that no server can delay the steps of a run."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import wandb.sdk.launch.sweeps.utils as agent
import yaml
from commands import ENVIRONMENT, SMALL, python
from wandb_files import history, of_kind, records

from trainer.monitor.alarms import Alarm
from trainer.monitor.tracker import Tracker
from trainer.settings.config import RunConfig

ONLINE = {"WANDB_API_KEY": "a" * 40, "WANDB_MODE": "online"}


@pytest.fixture
def tracker(run_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., Tracker]:
    """`tracker("key=value", ...)`: the tracker of a new attempt of the run folder `tmp_path`."""
    for name in ("config.yaml", "overrides.txt", "environment.json", "git.txt"):
        (tmp_path / name).write_text(f"{name} of the run\n")
    attempts = 0
    said: list[str] = []

    def start(*overrides: str) -> Tracker:
        nonlocal attempts
        attempts += 1
        made = Tracker(run_config(*overrides), tmp_path, attempts, said.append, is_main=True)
        made.said = said
        return made

    return start


def point(step: int) -> dict:
    layers = {"max_violation": [0.5, 1.5]}
    return {"step": step, "tokens": 10 * step, "loss": 1 / step, "layers": layers}


def newest(run_dir: Path) -> Path:
    """A folder for `history` with only the newest attempt, which the documents say to upload, once closed."""
    deadline = time.monotonic() + 20
    (path,) = (run_dir / "wandb/latest-run").glob("*.wandb")
    while not any(record.HasField("exit") for record in records(path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    (run_dir / "newest").mkdir()
    (run_dir / "newest" / "run-0").symlink_to((run_dir / "wandb/latest-run").resolve())
    return run_dir / "newest"


def test_offline_files_hold_the_run_once_over_all_attempts(tracker, tmp_path):
    """The second attempt repeats steps 3 and 4, after a kill that left half a last line."""
    settings = ["tracker.wandb=offline", "name=sweep/7", "tracker.tags=[a,b]", "tracker.project=p"]
    with tracker(*settings) as first:
        for step in (1, 2, 3, 4):
            first.log(point(step) | {"tokens_per_expert": [[1, 3], [2, 2]]} if step == 2 else point(step))
        first.log({"step": 4, "tokens": 40, "loss/validation": 0.125})
    time.sleep(1.1)  # the client names folders by the time in seconds
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    with tracker(*settings) as second:
        for step in (3, 4, 5):
            second.log(point(step) | ({"gradient_histogram": {"router": [1.0] * 48}} if step == 5 else {}))
        second.alert(5, Alarm("loss spike", "look"))

    folder, points = tmp_path / "wandb", history(newest(tmp_path))
    assert [row["step"] for row in history(folder)] == [1, 2, 3, 4, *range(1, 6)], "each file from step 1"
    assert [row["step"] for row in points] == [1, 2, 3, 4, 5]
    assert [row["_step"] for row in points] == [1, 2, 3, 4, 5], "steps must never go backwards"
    assert [row["tokens"] for row in points] == [10, 20, 30, 40, 50]
    assert points[3]["loss/validation"] == 0.125
    assert points[0]["layers/max_violation/1"] == 1.5
    assert points[1]["expert_load/_type"] == "image-file"
    images = list(folder.glob("offline-run-*/files/media/images/expert_load*.png"))
    assert [image.read_bytes()[:4] for image in images] == [b"\x89PNG"] * 2
    assert points[4]["gradient/router/values"] == [1] * 48

    runs = of_kind(folder, "run")
    assert len(runs) == 2
    assert {run.run_id for run in runs} == {(tmp_path / "wandb_id").read_text()}, "one run for all attempts"
    assert {(run.project, run.run_group, *run.tags) for run in runs} == {("p", "sweep", "a", "b")}
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["stage"]["seq_len"] > 0
    axes = {metric.name or metric.glob_name: metric.step_metric for metric in of_kind(folder, "metric")}
    assert axes["*"] == axes["loss"] == "step"
    assert [alert.title for alert in of_kind(folder, "alert")] == ["loss spike at step 5"]
    code = of_kind(folder, "artifact")[0]
    saved = {entry.path for entry in code.manifest.contents}
    assert {"trainer/train.py", "moe/router.py", "conf/train.yaml", "run/config.yaml"} <= saved
    summary = {i.key or i.nested_key[0]: i.value_json for s in of_kind(folder, "summary") for i in s.update}
    assert json.loads(summary["loss/validation"]) is not None

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["attempt"]) for line in lines if "loss" in line] == [
        *((step, 1) for step in (1, 2, 3, 4)),
        *((step, 2) for step in (3, 4, 5)),
    ]
    (load,) = map(json.loads, (tmp_path / "expert_load.jsonl").read_text().splitlines())
    assert load == {"step": 2, "tokens_per_expert": [[1, 3], [2, 2]], "attempt": 1}
    (alarm,) = map(json.loads, (tmp_path / "alarms.jsonl").read_text().splitlines())
    assert alarm == {"step": 5, "kind": "loss spike", "text": "look", "attempt": 2}


PROGRAM = """
import os, sys, time
from pathlib import Path
from hydra import compose, initialize_config_module
from trainer.settings.config import RunConfig
from trainer.monitor.tracker import Tracker
with initialize_config_module("conf", version_base="1.3"):
    config = RunConfig.load(compose("train", ["name=t", "tracker.wandb=offline"]))
with Tracker(config, Path(sys.argv[1]), 1, lambda text: print(text, flush=True), True) as tracker:
    for step in range(1, 6):
        tracker.log({"step": step, "tokens": step, "loss": 1.0})
"""


def in_a_process(run_dir: Path, rest: str) -> subprocess.CompletedProcess[str]:
    """Run PROGRAM, which logs five steps, and then `rest`, in a separate process."""
    command = [sys.executable, "-c", PROGRAM + rest, str(run_dir)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=ENVIRONMENT)


def test_a_killed_attempt_loses_nothing(tracker, tmp_path):
    """After kill -9 W&B's client lacks the last seconds of data; the next attempt sends them again."""
    tracker("tracker.wandb=disabled").__exit__(None, None, None)  # attempt 1, which PROGRAM then runs
    done = in_a_process(tmp_path, "    os.kill(os.getpid(), 9)\n")
    assert done.returncode == -signal.SIGKILL, done.stderr
    time.sleep(1.1)
    with tracker("tracker.wandb=offline") as second:
        for step in (4, 5, 6):
            second.log({"step": step, "tokens": step, "loss": 1.0})
    assert not second.said
    assert [row["step"] for row in history(newest(tmp_path))] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_the_client_may_die(tracker, tmp_path):
    """When its service process is killed, metrics.jsonl goes on, a warning is printed, the run succeeds."""
    tracker("tracker.wandb=disabled").__exit__(None, None, None)
    done = in_a_process(
        tmp_path,
        """
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    (service,) = [pid for pid in children if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(service), 9)
    for step in range(6, 106):
        tracker.log({"step": step, "tokens": step, "loss": 1.0})
        time.sleep(0.02)
""",
    )
    assert done.returncode == 0, done.stderr
    assert "warning: W&B has failed" in done.stdout
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 105


@pytest.fixture
def hanging_server() -> Iterator[str]:
    """A server on loopback that accepts connections and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    accepted = []
    threading.Thread(target=lambda: _accept(server, accepted), daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.close()
    assert accepted, "no client has connected"


def _accept(server: socket.socket, accepted: list[socket.socket]) -> None:
    while True:
        try:
            accepted.append(server.accept()[0])
        except OSError:
            return


@pytest.mark.parametrize("server", [pytest.param("dead", marks=pytest.mark.slow), "hanging"])
def test_no_server_holds_up_a_run(small, tmp_path, hanging_server, server):
    """Online, with a server that is down or never answers, a run only starts late."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    environment = {**ENVIRONMENT, **ONLINE, "WANDB_BASE_URL": dead if server == "dead" else hanging_server}
    if server == "dead":  # the fixture asserts that a client has connected
        socket.create_connection(hanging_server.removeprefix("http://").split(":")).close()
    arguments = ["name=a", "tracker.wandb=auto", "tracker.timeout_seconds=4"]
    started = time.monotonic()
    done = python(*small, *arguments, cwd=tmp_path, timeout=200, env=environment)
    total = time.monotonic() - started
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: W&B does not answer" in done.stdout
    assert "wandb sync runs/a/wandb/latest-run" in done.stdout
    run_dir = tmp_path / "runs/a"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_seconds" in line]
    assert len(steps) == 8
    waited = [line["step_seconds"] - sum(line[f"{p}_seconds"] for p in PARTS) for line in steps]
    assert max(waited[1:]) < 0.5 * max(line["step_seconds"] for line in steps) + 0.1, "no step waits for W&B"
    assert [row["step"] for row in history(run_dir / "wandb")] == list(range(1, 9)), "no point may be lost"
    assert total < 150


PARTS = ("forward", "backward", "optimizer", "communication", "other")


@pytest.mark.slow
def test_the_sweep_of_the_documents_runs(repository, corpus, tmp_path, monkeypatch):
    """The command line that `wandb agent` would start, built by its own functions, with the environment
    variables that it sets."""
    sweep = yaml.safe_load((repository / "docs/sweep.yaml").read_text())
    assert sweep["metric"]["name"] == "loss/validation"
    arguments = {
        key: {"value": of["values"][0] if "values" in of else of["min"]}
        for key, of in sweep["parameters"].items()
    }
    words = agent.create_sweep_command(list(sweep["command"]))
    parts = agent.create_sweep_command_args({"args": arguments}) | {
        "env": ["/usr/bin/env"],
        "interpreter": [sys.executable],
        "program": [sweep["program"]],
    }
    command = []
    for word in words:
        command += parts[word[2:-1]] if word[:2] == "${" and word[2:-1] in parts else [word]
    assert command[1:4] == [sys.executable, "-m", "trainer"]
    settings = [setting for setting in SMALL if setting.split("=")[0] not in arguments]
    environment = ENVIRONMENT | {
        "WANDB_MODE": "offline",
        "WANDB_RUN_ID": "agents1",
        "WANDB_SWEEP_ID": "abc",
        "WANDB_PROJECT": "of-the-sweep",
    }
    done = subprocess.run(
        [*command, *settings, *corpus],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = of_kind(tmp_path / "runs/sweep/agents1/wandb", "run")
    assert (run.run_id, run.project, run.sweep_id) == ("agents1", "of-the-sweep", "abc")
    for key, value in arguments.items():
        overrides = (tmp_path / "runs/sweep/agents1/overrides.txt").read_text()
        assert f"{key}={value['value']}" in overrides
