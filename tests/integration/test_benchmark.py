"""Benchmarks: lm-eval on our model, compared with its own `hf` model on the exported folder; no network."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import ENVIRONMENT, SMALL, assert_same_run, python

from data_pipeline.templated import template_of
from data_pipeline.tokenizer import load_tokenizer
from moe.config import ConfigError
from moe.model import CausalLM
from trainer.benchmark import main
from trainer.checkpoints.weights import load_model, ranks_for
from trainer.monitor.card import write_card
from trainer.monitor.report import Run, benchmarks_table
from trainer.settings.benchmarks import BenchmarksConfig
from trainer.stages.asked import Reader
from trainer.stages.benchmarks import Benchmarks
from trainer.stages.orders import Orders, Room

pytest.importorskip("lm_eval", reason="pip install '.[benchmark]'")

LENGTH = 96  # tokens that the model reads
TASKS = ["my_choice", "my_rolling", "my_writing"]
OFFLINE = {**ENVIRONMENT, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
DATA = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {0}/{1}.jsonl}}, cache_dir: {0}/cache}}\n"
CHOICE = """
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
target_delimiter: ""
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
"""
ROLLING = """
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
WRITING = """
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: [" it"], max_gen_toks: 24, do_sample: false}
process_results: !function measures.of_text
num_fewshot: 0
metric_list:
  - {metric: exact, aggregation: mean, higher_is_better: true}
  - {metric: crc, aggregation: mean, higher_is_better: true}
"""
MEASURES = """
import zlib

def of_text(doc, results):
    return {"exact": results[0] == doc["a"], "crc": zlib.crc32(results[0].encode())}

def fails(doc, results):
    raise KeyError("gold")
"""


def write_tasks(folder: Path) -> None:
    """Three tasks in `folder/tasks` and their data, with what is special at the first rows."""
    sentences = [
        f"The text number {n} follows {n - 1}, and {n * n} is its square.".split() for n in range(3, 18)
    ]
    cuts = [2 + n % 8 for n in range(15)]  # the first words that a question shows
    asked = [" ".join(words[:cut]) for words, cut in zip(sentences, cuts, strict=True)]
    rests = [" " + " ".join(words[cut:]) for words, cut in zip(sentences, cuts, strict=True)]
    # no context, one that ends with spaces, one longer than the model, and one that is cut with its answer
    asked += ["", f"{asked[2]}  ", " ".join(asked), ("The second number " * 40)[: 4 * LENGTH]]
    rests += ["The text number", rests[2], rests[0], " 5"]
    choices = [[" square. its", rest, rest[:7], " follows", " 7, and"] for rest in rests]
    rows = [
        {"q": q, "choices": of, "answer": n % 3} for n, (q, of) in enumerate(zip(asked, choices, strict=True))
    ]
    texts = [{"q": " ".join(asked[n : n + 2 * n])} for n in range(1, 6)]
    prompts = [
        {"q": q, "a": rest.partition(" it")[0]} for q, rest in zip(asked[:15], rests[:15], strict=True)
    ]
    prompts += [{"q": asked[17], "a": " 9"}]
    for name, some in (("choice", rows), ("texts", texts), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (folder / "tasks").mkdir()
    for name, data, text in zip(
        TASKS, ("choice", "texts", "prompts"), (CHOICE, ROLLING, WRITING), strict=True
    ):
        text = f"task: {name}\n{DATA.format(folder, data)}{text}"
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    (folder / "tasks" / "measures.py").write_text(MEASURES)


@pytest.fixture(scope="module")
def folder(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs/a`, a run that has learned something; `out`, its export; `tasks`, three tasks."""
    found = tmp_path_factory.mktemp("benchmark")
    alone = [
        "parallel.nproc_per_node=1",
        "parallel.ep_size=1",
        "stage.train_tokens=20480",
        "optimizer.lr=1e-2",
    ]
    alone += [
        f"model.max_position_embeddings={LENGTH}",
        "checkpoint.every_steps=100",
        "evaluate.every_steps=0",
    ]
    done = python("trainer", *SMALL, *corpus, *alone, "name=a", cwd=found)
    assert done.returncode == 0, done.stdout + done.stderr
    done = python("trainer.export", "runs/a", "out", cwd=found)
    assert done.returncode == 0, done.stderr
    write_tasks(found)
    return found


@pytest.fixture(scope="module")
def model(folder: Path) -> CausalLM:
    return load_model(folder / "out", ranks_for(folder / "out"))


def ours(folder: Path, model: CausalLM, tasks: list[str], chat: bool, **changed: object) -> dict:
    """What lm-eval's `evaluate` returns for our model in this process, with samples."""
    given = {"every_steps": 1, "limit": None, "num_fewshot": None, "rows_at_once": 5, **changed}
    config = BenchmarksConfig(tasks=tasks, include=[str(folder / "tasks")], **given)
    tokenizer, ranks = load_tokenizer(folder / "out"), ranks_for(folder / "out")
    reader = Reader.of_folder(folder / "out", tokenizer, LENGTH)
    if chat:
        reader = reader._replace(template=template_of(folder / "out"))
    room = Room(5, 4 * LENGTH)
    benchmarks = Benchmarks(config, reader, ranks, room, print)
    orders = Orders(model, None, tokenizer, ranks, room, print)
    return orders.run(lambda: benchmarks.measure(orders, log_samples=True))


def theirs(folder: Path, tasks: list[str], chat: bool, fewshot: int | None) -> dict:
    """The same for lm-eval's own model of Hugging Face."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder / "out"), "dtype": "float32"},
        device="cpu",
        batch_size=4,
        tasks=tasks,
        num_fewshot=fewshot,
        apply_chat_template=chat,
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
    )


def answers(results: dict, task: str) -> tuple[list[str], list[float], list[bool]]:
    """Of each sample of a task: its completions, its log-likelihoods, and which of them are greedy."""
    said, numbers, greedy = [], [], []
    for sample in results["samples"][task]:
        for (answer,) in sample["resps"]:
            if isinstance(answer, str):
                said.append(answer)
            else:
                log_prob, is_greedy = answer if isinstance(answer, tuple | list) else (answer, True)
                numbers.append(log_prob)
                greedy.append(bool(is_greedy))
    return said, numbers, greedy


@pytest.mark.parametrize(("chat", "fewshot"), [(False, None), (False, 2), (True, 1)])
def test_scores_are_those_of_the_hf_model(folder, model, chat, fewshot):
    tasks = TASKS if fewshot is None else ["my_choice"] + ["my_writing"] * chat
    mine = ours(folder, model, tasks, chat, num_fewshot=fewshot)
    other = theirs(folder, tasks, chat, fewshot)
    for task in tasks:
        (said, numbers, greedy), (they_said, their_numbers, their_greedy) = (
            answers(of, task) for of in (mine, other)
        )
        assert said == they_said
        assert greedy == their_greedy
        assert numbers == pytest.approx(their_numbers, rel=1e-6, abs=1e-5)
        scores = [
            {key: value for key, value in of["results"][task].items() if isinstance(value, int | float)}
            for of in (mine, other)
        ]
        assert len(scores[0]) >= 3
        assert scores[0] == pytest.approx(scores[1], rel=1e-6, abs=1e-6)
    if not chat and fewshot is None:  # otherwise the test above says little
        assert {True, False} == set(answers(mine, "my_choice")[2])
        assert len(set(answers(mine, "my_writing")[0])) > 3
        assert 0 < mine["results"]["my_choice"]["acc,none"] < 1


def test_the_same_examples_are_shown_each_time_and_no_generator_moves(folder, model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = [ours(folder, model, ["my_choice"], False, num_fewshot=2, limit=3) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    asked = [[sample["arguments"] for sample in of["samples"]["my_choice"]] for of in found]
    assert asked[0] == asked[1]
    assert len(asked[0]) == 3


def kept(run: Path, step: int) -> dict:
    """Task -> metric -> value, of a step's file."""
    tasks = json.loads((run / f"benchmarks/step-{step:08d}.json").read_text())["tasks"]
    return {task: {name: one["value"] for name, one in of["metrics"].items()} for task, of in tasks.items()}


def flat(scores: dict) -> dict:
    return {(task, metric): value for task, of in scores.items() for metric, value in of.items()}


def test_two_ranks_say_what_one_says_and_the_report_shows_it(folder, tmp_path, monkeypatch, capsys):
    asked = ["trainer.benchmark", "runs/a", "--tasks", "my_choice,tasks/my_rolling.yaml,my_writing"]
    asked += ["--include", "tasks", "--batch", "3"]
    monkeypatch.chdir(folder)
    assert main(asked[1:]) == 0
    said = capsys.readouterr().out
    one = kept(folder / "runs/a", 40)
    assert set(one) == set(TASKS)
    table, last = said.rsplit("\n", 2)[:2]
    assert "my_choice" in table
    assert (
        last == "written to runs/a/benchmarks/step-00000040.json; python -m trainer.report runs/a shows them"
    )

    two = python(*asked, "--nproc", "2", "--out", f"{tmp_path}/two.json", cwd=folder, env=OFFLINE)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("my_choice") == 1
    found = json.loads((tmp_path / "two.json").read_text())
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "two.json").rename(tmp_path / "benchmarks/step-00000040.json")
    assert flat(kept(tmp_path, 40)) == pytest.approx(flat(one), rel=1e-5)
    about = found["tasks"]["my_choice"]
    assert (found["checkpoint"], found["step"]) == ("step-00000040", 40)
    assert (about["version"], about["samples"], about["num_fewshot"]) == (2.0, 19, 0)

    assert main(["runs/a", "--tasks", "my_choice", "--include", "tasks", "--limit", "5"]) == 0
    assert kept(folder / "runs/a", 40)["my_rolling"] == one["my_rolling"], "other tasks stay"
    run = Run.read(folder / "runs/a")
    page = benchmarks_table(run.scores)
    assert "<td>my_choice</td><td>acc</td>" in page
    assert f"{one['my_rolling']['bits_per_byte']:.4f}" in page
    write_card(folder / "runs/a", tmp_path, run.config.model)
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Benchmarks") == 1
    assert "| my_choice, acc | " in card
    assert "5 documents" in card


@pytest.fixture
def told(folder, monkeypatch, capsys) -> Callable[..., str]:
    """`told("--tasks", ...)`: the message of a command that must end with 2."""
    from lm_eval import tasks

    real = tasks.TaskManager  # without lm-eval's own tasks, whose list takes long to read
    monkeypatch.setattr(tasks, "TaskManager", lambda **given: real(**given | {"include_defaults": False}))
    monkeypatch.chdir(folder)

    def tell(*arguments: str) -> str:
        assert main(["runs/a", *arguments]) == 2
        said = capsys.readouterr()
        assert not said.out
        return said.err

    return tell


def test_mistakes_are_told(folder, told):
    changed = {
        "no_data": DATA.format(folder, "missing") + CHOICE,
        "no_split": DATA.format(folder, "choice") + CHOICE.replace("test_split: test", "test_split: dev"),
        "too_long": DATA.format(folder, "prompts") + WRITING.replace("24", "96"),
        "beams": DATA.format(folder, "prompts") + WRITING.replace("do_sample: false", "num_beams: 4"),
        "fails": DATA.format(folder, "prompts") + WRITING.replace("of_text", "fails"),
        "endless": DATA.format(folder, "choice") + CHOICE.replace('"{{choices}}"', f'["{"word " * 200}", b]'),
    }
    for name, text in changed.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{text}")
    shutil.copy(folder / "tasks/measures.py", folder)
    (folder / "broken").mkdir()
    (folder / "broken/broken.yaml").write_text("task: broken\nmetric_list: [")

    said = told("--tasks", "my_chioce,no_data.yaml,no_split.yaml", "--include", "tasks")
    assert "--tasks: lm-eval knows no task my_chioce (did you mean my_choice?)" in said
    assert "--tasks: no_data.yaml cannot be loaded (" in said
    assert "missing.jsonl" in said
    assert "--tasks: no_split.yaml cannot be loaded (KeyError" in said
    assert "broken/broken.yaml cannot be loaded (ParserError" in told("--tasks", "broken/broken.yaml")
    assert "broken.yaml: while parsing" in told("--tasks", "broken", "--include", "broken")
    assert "broken/ holds no YAML file of a task" in told("--tasks", "broken/")
    said = told("--tasks", "too_long.yaml,beams.yaml")
    assert f"too_long: max_gen_toks=96 leaves no room for a question; the model reads {LENGTH}" in said
    assert "beams: generation_kwargs.num_beams=4 is not supported" in said
    assert "lm-eval cannot run fails (KeyError: 'gold')" in told("--tasks", "fails.yaml")
    assert f"but the model reads {LENGTH} at most" in told("--tasks", "endless.yaml")
    assert "there is no none.yaml" in told("--tasks", "none.yaml")
    assert "--limit=0 is below 1" in told("--tasks", "my_choice", "--limit", "0")
    assert "no is no folder" in told("--tasks", "my_choice", "--include", "no")
    assert "--out no/scores.json: there is no folder no" in told(
        "--tasks", "my_choice", "--out", "no/scores.json"
    )


def test_a_task_that_fails_lets_no_rank_wait(folder):
    (folder / "later.yaml").write_text(
        f"task: later\n{DATA.format(folder, 'prompts')}{WRITING.replace('measures.of_text', 'late.fails')}"
    )
    (folder / "late.py").write_text(MEASURES)
    done = python(
        "trainer.benchmark", "runs/a", "--tasks", "later.yaml", "--nproc", "2", cwd=folder, env=OFFLINE
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("lm-eval cannot run later (KeyError: 'gold')") == 1
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_without_the_package_the_remedy_is_told_before_a_step(folder, small, tmp_path):
    (tmp_path / "hidden/lm_eval").mkdir(parents=True)
    (tmp_path / "hidden/lm_eval/__init__.py").write_text("raise ModuleNotFoundError('No module lm_eval')")
    hidden = {**OFFLINE, "PYTHONPATH": f"{tmp_path}/hidden:{OFFLINE.get('PYTHONPATH', '')}"}
    some = f"[{folder}/tasks/my_choice.yaml]"
    trained = [*small, "name=t", "evaluate.benchmarks.every_steps=2", f"evaluate.benchmarks.tasks={some}"]
    for command in (["trainer.benchmark", f"{folder}/runs/a", "--tasks", "my_choice"], trained):
        done = python(*command, cwd=tmp_path, env=hidden)
        assert done.returncode == 2, done.stderr
        said = done.stdout + done.stderr
        assert "pip install '.[benchmark]'" in said
        assert "Traceback" not in said
        assert "step 1" not in said


@pytest.mark.timeout(600)
def test_training_does_not_notice_benchmarks(folder, small, tmp_path):
    """Under ZeRO-3 on two ranks, with a save, a resume and a selection bias."""
    given = [*small, "deepspeed=zero3", "balance.bias_update_rate=0.01", "evaluate.every_steps=5"]
    given += ["experts.router_jitter_noise=0.05"]  # in training mode only
    given += [f"model.max_position_embeddings={LENGTH}", "checkpoint.keep=9", "stage.train_tokens=3072"]
    wanted = [f"evaluate.benchmarks.tasks=[{','.join(TASKS)}]", "evaluate.benchmarks.every_steps=4"]
    wanted += [f"evaluate.benchmarks.include=[{folder}/tasks]", "evaluate.benchmarks.rows_at_once=4"]
    for name, more in (("plain", []), ("with", wanted)):
        done = python(*given, f"name={name}", *more, cwd=tmp_path, env=OFFLINE)
        assert done.returncode == 0, done.stdout + done.stderr
    plain, run = tmp_path / "runs/plain", tmp_path / "runs/with"
    assert_same_run(plain, run)
    for file in ("random.pt", "balance.pt"):
        states = [(of / "checkpoints/step-00000004" / file).read_bytes() for of in (plain, run)]
        assert states[0] == states[1], file
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = {line["step"]: line for line in lines if "benchmark/my_choice/acc" in line}
    assert set(told) == {4, 6}, "and after the last step"
    assert told[6]["benchmark/my_rolling/bits_per_byte"] == kept(run, 6)["my_rolling"]["bits_per_byte"]
    assert "benchmark/my_choice/acc 0." in done.stdout

    shutil.rmtree(run / "checkpoints/step-00000006")
    (run / "latest").write_text("step-00000004\n")
    before = kept(run, 6)
    (run / "benchmarks/step-00000006.json").unlink()
    done = python("trainer.resume", "runs/with", cwd=tmp_path, env=OFFLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(plain, run)
    assert kept(run, 6) == before

    (tmp_path / "benchmarks").mkdir()
    again = ["--tasks", f"{folder}/tasks/", "--out", f"{tmp_path}/benchmarks/step-00000006.json"]
    assert main([str(run), *again]) == 0
    assert flat(kept(tmp_path, 6)) == pytest.approx(flat(before), rel=1e-5)


def test_unknown_tasks_are_told_at_the_start_of_training(folder, run_config, model):
    with pytest.raises(ConfigError, match=r"evaluate.benchmarks.tasks: there is no x.yaml"):
        run_config("evaluate.benchmarks.tasks=[x.yaml]", "evaluate.benchmarks.every_steps=2").check()
