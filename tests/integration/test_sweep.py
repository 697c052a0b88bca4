"""A sweep on this machine: one run after another, each in processes of its own."""

import json

from commands import python


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
