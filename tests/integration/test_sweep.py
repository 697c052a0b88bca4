"""A sweep on this machine: one run after another, each in its own processes."""

import json
import signal
import subprocess
import sys
import time

from commands import ENVIRONMENT, last_step, python


def test_points_run_one_after_another(small, tmp_path):
    module, *overrides = small
    short = ["name=s", "stage.train_tokens=1024", "evaluate.every_steps=0", "seed=1,2"]
    done = python(module, "-m", *overrides, *short, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [tmp_path / "runs/s/0", tmp_path / "runs/s/1"]
    losses = []
    for run, seed in zip(runs, (1, 2), strict=True):
        assert json.loads((run / "state").read_text()) == {"attempt": 1, "state": "finished"}
        assert f"seed: {seed}\n" in (run / "config.yaml").read_text()
        losses.append(json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] != losses[1]
    assert (runs[1] / "overrides.txt").stat().st_mtime > (runs[0] / "state").stat().st_mtime
    assert not (tmp_path / "multirun.yaml").exists()
    broken = python(module, "-m", *overrides, "name=b", "optimizer.lr=1e-3,-1", cwd=tmp_path)
    assert broken.returncode == 2
    assert "optimizer.lr=-1" in broken.stderr


def test_a_stop_ends_the_sweep(small, tmp_path):
    module, *overrides = small
    long = ["name=s", "stage.train_tokens=409600", "evaluate.every_steps=0", "seed=1,2"]
    command = [sys.executable, "-m", module, "-m", *overrides, *long]
    with subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT) as sweep:
        try:
            deadline, first = time.monotonic() + 90, tmp_path / "runs/s/0"
            while not (first / "metrics.jsonl").exists() or last_step(first) < 1:
                assert time.monotonic() < deadline, "the run makes no progress"
                time.sleep(0.05)
            sweep.send_signal(signal.SIGINT)
            assert sweep.wait(timeout=60) == 0
        finally:
            sweep.kill()
    assert json.loads((first / "state").read_text()) == {"attempt": 1, "state": "stopped"}
    assert not (tmp_path / "runs/s/1").exists()
