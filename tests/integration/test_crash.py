"""Runs killed at random moments, and damaged checkpoints: a run always resumes from what was saved."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ENVIRONMENT, assert_same_run, last_step, metrics, python, ranks_of

from trainer.checkpoints.folder import damage
from trainer.settings.run_folder import checkpoints


def kill_at_random(arguments: list[str], cwd: Path, run_dir: Path, chance: random.Random) -> str | None:
    """Start a run, wait, kill -9 one rank or all. Returns what was killed, or None if the run ended first."""
    whom = chance.choice(["rank 0", "rank 1", "all"])
    reached, early = last_step(run_dir) if (run_dir / "metrics.jsonl").exists() else 0, chance.random() < 0.2
    with subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as launcher:
        deadline = time.monotonic() + 90
        while not early and launcher.poll() is None:  # `early`: kill it at its start or first steps
            if (run_dir / "metrics.jsonl").exists() and last_step(run_dir) > reached:
                break
            assert time.monotonic() < deadline, "the run makes no progress"
            time.sleep(0.01)
        time.sleep(chance.uniform(1, 6) if early else chance.uniform(0, 0.5))
        if launcher.poll() is not None:
            assert launcher.returncode == 0, launcher.stdout.read().decode()
            return None
        ranks = ranks_of(launcher)
        chosen = ranks if whom == "all" else ranks[: 1 + int(whom[-1])][-1:]
        if whom == "all":
            os.kill(launcher.pid, signal.SIGKILL)
        for rank in chosen:
            os.kill(rank, signal.SIGKILL)
        try:
            launcher.wait(timeout=90)
        finally:
            for rank in ranks_of(launcher):
                os.kill(rank, signal.SIGKILL)
            launcher.kill()
    return whom


def survive(small: list[str], tmp_path: Path, kills: int, steps: int) -> None:
    often = [f"stage.train_tokens={steps * 512}", "checkpoint.every_steps=1", "evaluate.every_steps=0"]
    straight = python(*small, "name=straight", *often, "checkpoint.every_steps=1000", cwd=tmp_path)
    assert straight.returncode == 0, straight.stdout + straight.stderr
    run_dir, chance = tmp_path / "runs/killed", random.Random(kills)
    arguments = [*small, "name=killed", *often]
    killed: list[str] = []
    while len(killed) < kills:
        whom = kill_at_random(arguments, tmp_path, run_dir, chance)
        if whom is None:  # the run has ended: set it back to an older checkpoint
            for path in checkpoints(run_dir)[:-1]:
                shutil.rmtree(path)
            continue
        killed.append(whom)
        for path in checkpoints(run_dir):
            assert damage(path) == [], (killed, path)
        if (run_dir / "config.yaml").exists():
            arguments = ["trainer.resume", "runs/killed"]
    finished = python("trainer.resume", "runs/killed", cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert len(list((run_dir / "checkpoints").iterdir())) == 3, "leftovers of crashes must be removed"
    assert_same_run(tmp_path / "runs/straight", run_dir)


def test_a_rank_that_dies_before_it_joins_ends_the_others(small, tmp_path):
    """No connection breaks for the ranks that wait for it, so the launcher has to end them."""
    arguments = [sys.executable, "-m", *small, "name=dead"]
    with subprocess.Popen(arguments, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE) as launcher:
        try:
            deadline = time.monotonic() + 90
            while len(ranks := ranks_of(launcher)) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(ranks[1], signal.SIGKILL)
            assert launcher.wait(timeout=60) == 1
        finally:
            for rank in ranks_of(launcher):
                os.kill(rank, signal.SIGKILL)
            launcher.kill()


def test_kill_9_at_random_moments(small, tmp_path):
    survive(small, tmp_path, kills=2, steps=12)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kill_9_at_very_many_random_moments(small, tmp_path):
    survive(small, tmp_path, kills=24, steps=100)


DAMAGE = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes instead of"),
    "flipped": (lambda path: flip_a_bit(path), "its checksum differs"),
    "missing": (lambda path: path.unlink(), "cannot be read (No such file or directory)"),
}


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_resume_falls_back_to_the_newest_whole_checkpoint(train, tmp_path):
    """Each newer one is damaged differently, `latest` names a missing one; the run ends as without damage."""
    every = ["checkpoint.every_steps=1", "checkpoint.keep=9"]
    assert train("name=straight", *every).returncode == 0
    run_dir = tmp_path / "runs/broken"
    shutil.copytree(tmp_path / "runs/straight", run_dir)
    places = ["optimizer/rank-00001.safetensors", "hf/model-00000-00001.safetensors", "random.pt"]
    expected = []
    for step, (kind, place) in enumerate(zip(DAMAGE, places, strict=True), start=6):
        damage_it, message = DAMAGE[kind]
        damage_it(run_dir / f"checkpoints/step-{step:08d}" / place)
        expected.append(f"step-{step:08d}: {place} ")
        assert message in damage(run_dir / f"checkpoints/step-{step:08d}")[0]
    flip_a_bit(run_dir / "checkpoints/step-00000005/manifest.json")
    (run_dir / "latest").write_text("step-00000099\n")

    seen = python("trainer.inspect", "runs/broken", cwd=tmp_path)
    assert seen.returncode == 1
    assert seen.stdout.count(": damaged") == 4
    assert seen.stdout.count(": whole") == 4

    resumed = python("trainer.resume", "runs/broken", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "going on from step-00000004, which is whole" in resumed.stdout
    assert "step-00000005: manifest.json cannot be read" in resumed.stdout
    for line in expected:
        assert resumed.stdout.count(line) == 1
    assert_same_run(tmp_path / "runs/straight", run_dir)
    assert python("trainer.inspect", "runs/broken", cwd=tmp_path).returncode == 0

    for path in checkpoints(run_dir):
        (path / "balance.pt").unlink()
    refused = python("trainer.resume", "runs/broken", cwd=tmp_path)
    assert refused.returncode == 2, "a run must not restart from step 0 by itself"
    assert refused.stdout.count("holds no whole checkpoint") == 1, "one message, not one of each rank"


def test_resume_on_another_layout(finished, tmp_path):
    """The layout is recorded in the folder and later resumes use it; other keys are refused by name."""
    run_dir = tmp_path / "runs/moved"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "checkpoints/step-00000008")
    refused = python("trainer.resume", "runs/moved", "optimizer.lr=1", "deepspeed=zero9", cwd=tmp_path)
    assert refused.returncode == 2
    free = "only KEY=VALUE with these keys can change at a resume: device, parallel"
    assert f"optimizer.lr=1: {free}" in refused.stderr
    assert "deepspeed=zero9 is unknown; use zero0, zero1, zero2, zero3" in refused.stderr
    assert not list(run_dir.glob("resume-*"))

    layout = ["deepspeed=zero3", "parallel.nproc_per_node=1", "parallel.ep_size=1", "micro_batch_size=4"]
    moved = python("trainer.resume", "runs/moved", *layout, cwd=tmp_path)
    assert moved.returncode == 0, moved.stdout + moved.stderr
    assert "1 ranks, ep_size 1, ZeRO 3, 2 micro-batches per step" in moved.stdout
    assert (run_dir / "resume-2.yaml").read_text().startswith(f"# python -m trainer.resume with {layout}")
    described = python("trainer.inspect", "runs/moved/checkpoints/step-00000008", cwd=tmp_path)
    assert described.returncode == 0
    assert "step 8, 4,096 tokens, next row 64" in described.stdout
    assert "dtype fp32, ep_size 1, world_size 1, zero_stage 3" in described.stdout
    expected = {line["step"]: line for line in metrics(finished)}
    for line in metrics(run_dir):
        if line["attempt"] == 2:
            for key in ("loss", "grad_norm", "balance_loss"):
                assert line[key] == pytest.approx(expected[line["step"]][key], rel=1e-5)


def test_a_run_that_goes_on_does_not_need_the_weights_it_started_from(train, finished, tmp_path):
    two = ["name=two", f"stage.init_from={finished}"]
    assert train(*two).returncode == 0
    shutil.rmtree(finished)
    assert train(*two).returncode == 0, "neither the command nor its ranks may need runs/a"
    refused = train("name=three", *two[1:])
    assert refused.returncode == 2
    assert "runs/a is not a folder" in refused.stderr
    assert python("trainer.inspect", "runs/a", cwd=tmp_path).returncode == 2
