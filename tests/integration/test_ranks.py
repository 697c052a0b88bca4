"""Commands that load a model on several ranks, each with its own experts, say what they say on one."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ENVIRONMENT, SMALL, kill_a_rank, python

ALONE = ["parallel.nproc_per_node=1", "parallel.ep_size=1", "stage.train_tokens=1024"]
ROWS = [{"prompt": f"The text number {n}" + " and" * n} for n in range(7)]


@pytest.fixture(scope="module")
def run(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, and a file of prompts beside it."""
    folder = tmp_path_factory.mktemp("ranks")
    often = ["checkpoint.every_steps=1", "evaluate.every_steps=1"]
    bias = "balance.bias_update_rate=0.1"
    done = python("trainer", *SMALL, *corpus, *ALONE, *often, bias, "name=a", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def completions(path: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["number"] for line in lines}) == len(lines)
    return {line["number"]: line["completion"] for line in lines}


def test_losses_are_those_of_the_run_on_any_number_of_ranks(run):
    """With its bias. Without a checkpoint, the newest is meant."""
    lines = map(json.loads, (run / "runs/a/metrics.jsonl").read_text().splitlines())
    logged = {line["step"]: line for line in lines if "loss/text" in line}
    for source, nproc, step in (
        ("runs/a", "1", 2),
        ("runs/a", "2", 2),
        ("runs/a/checkpoints/step-00000001", "1", 1),
    ):
        done = python("trainer.evaluate", source, "--nproc", nproc, cwd=run)
        assert done.returncode == 0, done.stderr
        found = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
        assert set(found) == {"loss/text", "loss/second", "loss/validation"}
        assert found == pytest.approx({key: logged[step][key] for key in found}, abs=2e-6)  # six digits


def test_completions_are_those_of_one_rank_also_after_a_kill(run):
    how = ["trainer.generate", "runs/a", "--prompts", "in.jsonl", "--tokens", "40"]
    how += ["--rows", "2", "--temperature", "0.7"]
    for name, nproc in (("one", "1"), ("two", "2")):
        done = python(*how, "--out", f"{name}.jsonl", "--nproc", nproc, cwd=run)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{name}.jsonl holds the completions of 7 prompts, 7 of them new\n"
    one = completions(run / "one.jsonl")
    assert completions(run / "two.jsonl") == one
    assert len(one) == len(ROWS)

    command = [sys.executable, "-m", *how, "--out", "killed.jsonl", "--nproc", "2"]
    part = run / ".killed.jsonl.rank-1"
    with subprocess.Popen(command, cwd=run, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as launcher:
        until = time.monotonic() + 60
        while not part.exists() or not part.read_bytes():
            assert time.monotonic() < until, "rank 1 completed nothing"
            time.sleep(0.002)
        kill_a_rank(launcher)
        said = launcher.communicate(timeout=60)[1]
    assert launcher.returncode == 1
    assert "rank 1 was killed" in said
    whole = part.read_bytes().split(b"\n")[:-1]
    assert {json.loads(line)["number"] for line in whole} <= {1, 3, 5}, "ranks divide the prompts"
    done = python(*how, "--out", "killed.jsonl", cwd=run)
    assert done.returncode == 0, done.stderr
    assert "7 of them new" not in done.stdout
    assert completions(run / "killed.jsonl") == one
    assert not list(run.glob(".*.rank-*"))


def test_one_prompt_is_printed_once(run):
    how = ["trainer.generate", "runs/a", "The text", "--tokens", "12"]
    found = [python(*how, "--nproc", n, cwd=run) for n in ("1", "2")]
    assert found[0].stdout.startswith("The text")
    assert found[1].stdout == found[0].stdout
    assert found[1].returncode == 0, found[1].stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.evaluate", "runs/a", "--nproc", "3"], "3 ranks cannot share the 16 experts"),
        (["trainer.generate", "runs/b", "a", "--nproc", "2"], "runs/b is no folder here"),
        (["trainer.evaluate", "runs/a", "--nproc", "0"], "--nproc must be above 0"),
        (
            ["trainer.generate", "runs/a", "--prompts", "no", "--out", "o", "--nproc", "2"],
            "no cannot be read",
        ),
    ],
)
def test_a_mistake_is_told_once(run, arguments, message):
    done = python(*arguments, cwd=run)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(message) == 1
    assert "Traceback" not in done.stderr
    assert not done.stdout
