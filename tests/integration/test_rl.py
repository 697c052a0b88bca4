"""Runs with rewards, as a user starts them: killed in every part of a step, evaluated, reported, refused."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from commands import ENVIRONMENT, SMALL, assert_same_run, metrics, python
from test_crash import survive
from wandb_files import history

VERIFIER = """
import os, signal
from pathlib import Path

def check(fields, completion, options):
    '''Half of the letters; the call after `after` others kills the rank that waits for it, once.'''
    calls, killed = Path("calls"), Path("killed")
    with calls.open("a") as file:
        file.write(".")
    if options["after"] and calls.stat().st_size > options["after"] and not killed.exists():
        killed.write_text("")
        os.kill(os.getppid(), signal.SIGKILL)
    letters = [character for character in completion if character.isalpha()]
    return sum(letter in "aeioubcdfg" for letter in letters) / max(len(letters), 1), "letters"
"""


@pytest.fixture(scope="module")
def asks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for prepared prompts, for rewards, and for few steps."""
    folder = tmp_path_factory.mktemp("asks")
    rows = [
        {"prompt": " ".join(f"{n * k}" for k in range(n % 5)) + f" {n}", "answer": "e"} for n in range(80)
    ]
    (folder / "asks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        *("data=jsonl", f"data.dir={folder}/prepared", "data.tokenizer_vocab_size=512"),
        *("data.validation_fraction=0.1", "rl=grpo", "rl.group_size=4", "rl.updates=2"),
        *("rl.max_prompt_tokens=48", "rl.sampling.max_new_tokens=12", "rl.sampling.rows_at_once=8"),
        f"+data.sources.asks={{kind: prompts, paths: [{folder}/asks.jsonl]}}",
        "rl.verifiers={vowel: {kind: regex, weight: 1.0, options: {pattern: '[aeiou]', match: search}}}",
    ]
    prepared = python("data_pipeline", "name=t", "model.vocab_size=512", *overrides, cwd=folder)
    assert prepared.returncode == 0, prepared.stderr
    return overrides


@pytest.fixture(scope="module")
def rewarded(asks: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a finished run, `runs/a`, and what the run has said."""
    folder = tmp_path_factory.mktemp("rewarded")
    done = python("trainer", *SMALL, *asks, "name=a", "tracker.wandb=offline", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_kill_9_at_random_moments(asks: list[str], tmp_path: Path) -> None:
    """Most of a step is sampling; every second checkpoint lies inside a phase."""
    survive(["trainer", *SMALL, *asks], tmp_path, kills=2, steps=12)


def test_kill_9_while_rewards_are_computed(asks: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(VERIFIER)
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ENVIRONMENT.get('PYTHONPATH', '')}"}
    settings = [one for one in asks if not one.startswith("rl.verifiers")]

    def run(*arguments: str) -> tuple[int, str]:
        found = python(*arguments, cwd=tmp_path, env=environment)
        return found.returncode, found.stdout + found.stderr

    often = ["checkpoint.every_steps=1", "evaluate.every_steps=0"]
    for name, after in (("straight", 0), ("killed", 60)):
        mine = f"rl.verifiers={{mine: {{kind: 'mine:check', weight: 1.0, options: {{after: {after}}}}}}}"
        code, said = run("trainer", *SMALL, *settings, *often, f"name={name}", mine)
        assert (code == 0) == (name == "straight"), said
        (tmp_path / "calls").unlink()
    assert (tmp_path / "killed").exists()
    assert 0 < len(metrics(tmp_path / "runs/killed")) < 8
    code, said = run("trainer.resume", "runs/killed")
    assert code == 0, said
    assert_same_run(tmp_path / "runs/straight", tmp_path / "runs/killed")
    runs = (tmp_path / "runs/straight", tmp_path / "runs/killed")
    straight, killed = ({line["step"]: line["reward"] for line in metrics(run)} for run in runs)
    assert straight == killed
    assert len(set(straight.values())) > 1


def test_a_run_tells_evaluates_and_reports_its_rewards(rewarded: tuple[Path, str]) -> None:
    folder, said = rewarded
    tables = [point for point in history(folder / "runs/a/wandb") if "samples/_type" in point]
    shown = [(point["_step"], point["samples/_type"], point["samples/nrows"]) for point in tables]
    assert shown == [(step, "table-file", 8) for step in range(1, 9)]
    assert "2 prompts x 4 completions per step, rewards: vowel (regex)" in said
    assert said.count("reward 0.") + said.count("reward 1.") >= 8
    assert "reward/asks" in said
    lines = [json.loads(line) for line in (folder / "runs/a/metrics.jsonl").read_text().splitlines()]
    logged, held_out = metrics(folder / "runs/a"), [line for line in lines if "reward/validation" in line]
    assert [line["step"] for line in logged] == list(range(1, 9))
    assert [line["step"] for line in held_out] == [4, 8]
    text = Path(__file__).parents[2].joinpath("docs/monitoring.md").read_text().split("## Alarms")[0]
    documented, of_rewards = (
        set(re.findall(r"`([a-z_]+)`", part))
        for part in (text, text.split("[rewards]")[1].split("With a [teacher]")[0])
    )
    assert {key for key in logged[0] if "/" not in key} - {"rewards"} <= documented
    optional = {"router_mismatch", "reference_seconds"}
    assert {key for key in of_rewards if "_" in key} - logged[0].keys() == optional
    for line in logged:
        assert {"reward", "rewards", "flat_groups", "entropy", "ratio"} <= line.keys()
        assert line["stall_fraction"] < 0.5, "sampling is not waiting for data"
    for line in (line for line in logged if "sampling_seconds" in line):
        training = line["step_seconds"] - line["sampling_seconds"] - line["scoring_seconds"]
        speed = line["tokens_per_second"] * line["step_seconds"] / training
        assert line["trained_tokens_per_second"] == pytest.approx(speed)
    assert [line["step"] for line in logged if "sampling_seconds" in line] == [1, 3, 5, 7], (
        "phases of two steps"
    )
    samples = [json.loads(line) for line in (folder / "runs/a/samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == set(range(1, 9))
    assert all(sample["prompt"].startswith("<|im_start|>user\n") for sample in samples)
    reported = python("trainer.report", "runs/a", cwd=folder)
    assert reported.returncode == 0, reported.stderr
    page = (folder / "runs/a/report/report.html").read_text()
    shown = page.count("vowel: ")
    assert shown == 8
    assert "Is it rewarded?" in page
    assert "Completions of step 8" in page
    assert "reward " in page
    with (folder / "runs/a/samples.jsonl").open("a") as file:  # a second attempt has repeated the step
        file.writelines(json.dumps({**sample, "attempt": 2}) + "\n" for sample in samples[-8:])
    assert python("trainer.report", "runs/a", cwd=folder).returncode == 0
    assert (folder / "runs/a/report/report.html").read_text().count("vowel: ") == shown


def test_a_prompt_longer_than_allowed_is_told_before_anything_is_sampled(
    asks: list[str], tmp_path: Path
) -> None:
    refused = python("trainer", *SMALL, *asks, "name=a", "rl.max_prompt_tokens=8", cwd=tmp_path)
    assert refused.returncode == 2
    assert "rl.max_prompt_tokens=8" in refused.stdout + refused.stderr
    assert "Traceback" not in refused.stdout + refused.stderr


def test_a_reference_stays_what_it_was(asks: list[str], rewarded: tuple[Path, str], tmp_path: Path) -> None:
    """At the start it is the model itself; a run that goes on still has it, without its own origin."""
    first = rewarded[0] / "runs/a"
    begins = [f"stage.init_from={first}", "rl.kl_coef=0.1", f"rl.reference={first}", "rl.updates=1"]
    second = python("trainer", *SMALL, *asks, *begins, "name=b", cwd=tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    told = {line["step"]: line["reference_kl"] for line in metrics(tmp_path / "runs/b")}
    assert abs(told[1]) < 1e-6
    assert told[8] > 1e-4
    shutil.rmtree(tmp_path / "runs/b/checkpoints/step-00000008")
    again = python("trainer.resume", "runs/b", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    lines = [(line["step"], line["reference_kl"]) for line in metrics(tmp_path / "runs/b")]
    assert lines == [*told.items(), *(item for item in told.items() if item[0] > 4)]
    one_step = ["stage.train_tokens=512", "schedule.warmup_steps=0"]
    third = python("trainer", *SMALL, *asks, *begins[1:], *one_step, "name=c", cwd=tmp_path)
    assert third.returncode == 0, third.stdout + third.stderr
    assert metrics(tmp_path / "runs/c")[0]["reference_kl"] > 1e-4, "it did not start from its reference"


def test_evaluate_finds_the_rewards_of_the_run(rewarded: tuple[Path, str]) -> None:
    folder, _ = rewarded
    lines = [json.loads(line) for line in (folder / "runs/a/metrics.jsonl").read_text().splitlines()]
    told = next(line for line in reversed(lines) if "reward/validation" in line)
    found = python("trainer.evaluate", "runs/a", cwd=folder)
    assert found.returncode == 0, found.stderr
    expected = [f"{key} {told[key]:.6f}" for key in ("reward/asks", "reward/validation")]
    assert found.stdout.splitlines() == expected
