"""Runs as a user starts them: they learn, stop and resume, and every mistake gives one clear message."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import ENVIRONMENT, assert_same_run, kill_a_rank, last_step, metrics, python, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trainer.checkpoints.folder import measure
from trainer.checkpoints.weights import load_model
from trainer.ranks.runtime import Ranks
from trainer.settings.run_folder import read_manifest, write_manifest


def test_a_run_learns_and_leaves_a_folder_that_transformers_loads(train, tmp_path):
    done = train("name=a", "stage.train_tokens=15360", "optimizer.lr=5e-3", "tracker.wandb=offline")
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = tmp_path / "runs/a"
    losses = [line["loss"] for line in metrics(run_dir)]
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 1.5
    assert json.loads((run_dir / "state").read_text())["state"] == "finished"
    assert "held out" in done.stdout
    assert "next" in done.stdout

    (offline,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    assert b"balance_loss" in offline.read_bytes()

    folder = run_dir / "checkpoints/step-00000030/hf"
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ours = load_model(folder, Ranks(0, 0, 1, torch.device("cpu")))
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        logits = ours(ids, ids, torch.tensor([0, 40], dtype=torch.int32)).logits
        torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)

    written = python("trainer.generate", "runs/a", "The text number", "--tokens", "8", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("The text number")


@pytest.mark.parametrize(
    "layout",
    [
        ["deepspeed=zero1"],
        ["deepspeed=zero3", "dtype=bf16", "recompute=full"],
        [
            *("deepspeed=zero2", "parallel.dispatcher=all_to_all"),
            *("balance.mode=prior_buffer", "balance.bias_update_rate=0.01", "balance.micro_weight=0.01"),
        ],
        ["deepspeed=zero0", "parallel.ep_size=1"],
    ],
    ids=["zero1", "zero3-bf16", "zero2-prior-bias", "zero0"],
)
def test_interrupted_equals_straight(train, small, tmp_path, layout):
    """A run that is stopped, resumed, killed and resumed again equals an undisturbed run bit for bit."""
    straight = train("name=straight", *layout)
    assert straight.returncode == 0, straight.stdout + straight.stderr
    run_dir = tmp_path / "runs/broken"
    arguments = [*small, "name=broken", *layout]
    assert (
        interrupt(arguments, tmp_path, run_dir, 2, lambda launcher: launcher.send_signal(signal.SIGTERM)) == 0
    )
    assert json.loads((run_dir / "state").read_text())["state"] == "stopped"
    stopped = last_step(run_dir)
    assert interrupt(["trainer.resume", "runs/broken"], tmp_path, run_dir, stopped + 1, kill_a_rank) == 1
    assert json.loads((run_dir / "state").read_text())["attempt"] == 2
    finished = python("trainer.resume", "runs/broken", cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert_same_run(tmp_path / "runs/straight", run_dir)


def interrupt(
    arguments: list[str], cwd: Path, run_dir: Path, step: int, how: Callable[[subprocess.Popen], None]
) -> int:
    """Start a run, call `how` with its launcher once `step` is logged, and return the exit code."""
    with subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            deadline = time.monotonic() + 90
            while not (run_dir / "metrics.jsonl").exists() or last_step(run_dir) < step:
                assert time.monotonic() < deadline, "the run makes no progress"
                assert process.poll() is None, process.stdout.read().decode()
                time.sleep(0.01)
            how(process)
            return process.wait(timeout=60)
        finally:
            process.kill()


def test_an_attempt_that_was_taken_over_leaves_the_state_alone(small, tmp_path):
    """As on a node that was cut off and returns after another attempt has taken over the run elsewhere."""
    taken = {"attempt": 7, "state": "stopped"}

    def take_over(launcher: subprocess.Popen) -> None:
        (tmp_path / "runs/old/state").write_text(json.dumps(taken))
        launcher.send_signal(signal.SIGINT)

    arguments = [*small, "name=old", "stage.train_tokens=409600", "evaluate.every_steps=0"]
    assert interrupt(arguments, tmp_path, tmp_path / "runs/old", 1, take_over) == 1, "it must not save"
    assert json.loads((tmp_path / "runs/old/state").read_text()) == taken


def test_a_run_outlives_the_reader_of_its_output(small, tmp_path):
    command = [sys.executable, "-m", *small, "name=alone", "evaluate.every_steps=0"]
    with subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE) as process:
        try:
            assert any(b"step 1/8" in line for line in process.stdout)
            process.stdout.close()
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
    assert json.loads((tmp_path / "runs/alone/state").read_text())["state"] == "finished"


def test_a_run_cannot_be_started_twice_at_once(small, tmp_path):
    def start_another(launcher: subprocess.Popen) -> None:
        second = python("trainer.resume", "runs/twice", cwd=tmp_path)
        assert second.returncode == 2
        assert "runs/twice is running already" in second.stderr
        launcher.send_signal(signal.SIGINT)

    arguments = [*small, "name=twice", "stage.train_tokens=409600", "evaluate.every_steps=0"]
    assert interrupt(arguments, tmp_path, tmp_path / "runs/twice", 1, start_another) == 0
    assert json.loads((tmp_path / "runs/twice/state").read_text()) == {"attempt": 1, "state": "stopped"}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_dense_model_trains(train, tmp_path, stage):
    done = train(
        "name=d",
        "model=tiny_dense",
        "model.num_experts=0",
        f"deepspeed=zero{stage}",
        "parallel.ep_size=1",
        "optimizer.lr=5e-3",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [line["loss"] for line in metrics(tmp_path / "runs/d")]
    assert losses[-1] < losses[0] - 0.3


def test_a_full_disk_keeps_the_last_checkpoint(train, tmp_path):
    """The folder of the next checkpoint cannot be created, as on a full or read-only disk."""
    assert train("name=full", "stage.train_tokens=2048").returncode == 0
    run_dir = tmp_path / "runs/full"
    before = weights(run_dir)
    (run_dir / "config.yaml").write_text((run_dir / "config.yaml").read_text().replace(": 2048", ": 4096"))
    (run_dir / "checkpoints/.step-00000008.attempt-2").write_text("in the way")
    done = python("trainer.resume", "runs/full", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.count("cannot write the checkpoint of step 8") == 1, "not a message per rank"
    assert json.loads((run_dir / "state").read_text())["state"] == "failed"
    after = weights(run_dir)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_starts_of_one_name_never_mix(small, tmp_path):
    """One of them is refused, and the frozen configuration is that of the run that was started."""
    rates = ("1e-3", "5e-3")
    starts = [
        subprocess.Popen(
            [sys.executable, "-m", *small, "name=race", f"optimizer.lr={rate}", "evaluate.every_steps=0"],
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rate in rates
    ]
    codes = [start.wait(timeout=120) for start in starts]
    assert sorted(codes) == [0, 2]
    frozen = (tmp_path / "runs/race/config.yaml").read_text()
    assert f"lr: {float(rates[codes.index(0)])}" in frozen


def test_evaluation_leaves_training_alone(train, tmp_path):
    """Held-out rows pass through the same model and must change no count, prior, bias or random state."""
    balance = ["balance.mode=prior_buffer", "balance.bias_update_rate=0.01", "checkpoint.every_steps=8"]
    assert train("name=never", *balance, "evaluate.every_steps=0").returncode == 0
    assert train("name=always", *balance, "evaluate.every_steps=1").returncode == 0
    assert_same_run(tmp_path / "runs/never", tmp_path / "runs/always")


def test_the_same_configuration_goes_on_and_another_is_refused(train, finished):
    again = train("name=a")
    assert again.returncode == 0
    assert "the run is finished" in again.stdout
    refused = train("name=a", "optimizer.lr=0.5", "seed=7")
    assert refused.returncode == 2
    assert "runs/a holds another run" in refused.stderr
    assert "optimizer.lr: folder 0.0003, now 0.5" in refused.stderr
    assert "seed: folder 1234, now 7" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_an_overflow_stops_and_keeps_the_last_good_checkpoint(train, tmp_path):
    # the first update makes the weights huge, so that the backward of the next step overflows
    wild = ["optimizer.lr=1e30", "schedule=constant", "checkpoint.every_steps=1", "evaluate.every_steps=0"]
    broken = train("name=wild", *wild)
    assert broken.returncode == 1
    assert "the gradient is not finite at step" in broken.stdout
    assert "Traceback" not in broken.stdout + broken.stderr
    assert json.loads((tmp_path / "runs/wild/state").read_text())["state"] == "failed"
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "runs/wild").values())


def test_a_loss_that_is_no_number_names_step_rank_and_rows(train, tmp_path):
    """The weights of <|endoftext|>, which is in some rows only, become no numbers between two steps."""
    two_steps = ["stage.train_tokens=1024", "checkpoint.every_steps=1", "evaluate.every_steps=0"]
    assert train("name=nan", "model.tie_word_embeddings=false", *two_steps).returncode == 0
    run_dir = tmp_path / "runs/nan"
    shutil.rmtree(run_dir / "checkpoints/step-00000002")
    folder, planted = run_dir / "checkpoints/step-00000001", 0
    for file in folder.glob("optimizer/*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.startswith("model.embed_tokens.weight:0:")]:
            tensors[name][:64] = float("nan")
            planted += 1
        save_file(tensors, file)
        manifest = read_manifest(folder)
        manifest["files"][f"optimizer/{file.name}"] = measure(file)
        write_manifest(folder, manifest)
    assert planted
    broken = python("trainer.resume", "runs/nan", cwd=tmp_path)
    assert broken.returncode == 1, broken.stdout + broken.stderr
    found = re.findall(r"rank (\d), rows \[(\d+), (\d+)\]", broken.stdout)
    assert "not finite at step 2" in broken.stdout
    assert found, broken.stdout
    assert all((int(first) // 2) % 2 == int(rank) for rank, first, _ in found), "two rows per rank in turn"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.learning_rate=1"], "learning_rate"),
        (["model=gpt2"], "gpt2"),
        (["stage.seq_len=many"], "stage.seq_len=many must be of type int"),
        (["parallel.ep_size=3"], "parallel.ep_size=3 does not divide"),
        (["data.dir=nowhere"], "run python -m data_pipeline"),
        (["model.vocab_size=300"], "model.vocab_size=300 is smaller than the tokenizer"),
        (["data.validation_fraction=0.2"], "prepared with another configuration"),
        (["stage.init_from=nowhere"], "stage.init_from=nowhere is not a folder"),
        (["output_dir=/proc/nothing"], "cannot write the run folder"),
        (["seed=-1"], "seed=-1 must be a number from 0"),
        (["schedule.warmup_steps=500"], "schedule.warmup_steps=500 exceeds the 8 steps"),
        (["name=."], "must be a relative path inside output_dir"),
    ],
)
def test_mistakes_exit_with_2_and_one_message(train, tmp_path, overrides, message):
    done = train("name=a", *overrides)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs/a/state").exists(), "nothing may be started"


def test_a_stage_starts_from_the_weights_of_another(train, tmp_path):
    assert train("name=one", "optimizer.lr=5e-3").returncode == 0
    folder = "runs/one/checkpoints/step-00000008/hf"
    assert train("name=two", f"stage.init_from={folder}", "deepspeed=zero3").returncode == 0
    carried, last = metrics(tmp_path / "runs/two")[0]["loss"], metrics(tmp_path / "runs/one")[-1]["loss"]
    assert abs(carried - last) < 0.5
    assert carried < metrics(tmp_path / "runs/one")[0]["loss"] - 0.5
