"""Keys of benchmarks, and the files of their scores."""

import json

import pytest

from moe.config import ConfigError
from trainer.settings.benchmarks import Score, newest_scores, score_rows, scores_file, write_scores

PREFIX = "evaluate.benchmarks."


def score(task: str, metric: str, value: float, stderr: float | None = None, step: int = 5) -> Score:
    return Score(task, metric, value, stderr, step, {"num_fewshot": 0, "limit": None})


def test_a_run_has_no_benchmarks_unless_it_names_them(run_config):
    assert not run_config().evaluate.benchmarks.wanted
    some = [f"{PREFIX}tasks=[hellaswag]", f"{PREFIX}every_steps=5"]
    assert run_config(*some).evaluate.benchmarks.wanted
    run_config(*some).check()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["every_steps=4"], "every_steps=4 has no tasks to run; name them"),
        (["tasks=[a,b,a]"], "tasks names a twice"),
        (["limit=0"], "limit=0 is below 1; use 1 or more, or null"),
        (["num_fewshot=-1"], "num_fewshot=-1 is below 0; use 0 or more, or null"),
        (["include=[nowhere]"], "include: nowhere is no folder"),
        (["tasks=[nowhere/a.yaml]"], "tasks: there is no nowhere/a.yaml; name a task"),
        (["rows_at_once=0"], "rows_at_once=0 is below 1"),
        (["every_steps=-1"], "every_steps=-1 is below 0"),
    ],
)
def test_laws(run_config, overrides, message):
    with pytest.raises(ConfigError) as caught:
        run_config(*(PREFIX + override for override in overrides)).check()
    assert any(f"{PREFIX}{message}" in problem for problem in caught.value.problems), caught.value.problems


def test_paths_become_absolute_and_names_stay(run_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run_config(f"{PREFIX}tasks=[hellaswag,a.yaml,b/]", f"{PREFIX}include=[c]").evaluate.benchmarks
    assert found.absolute() == {
        "tasks": ["hellaswag", f"{tmp_path}/a.yaml", f"{tmp_path}/b"],
        "include": [f"{tmp_path}/c"],
    }
    assert sorted(map(str, found.paths())) == [f"{tmp_path}/a.yaml", f"{tmp_path}/b", f"{tmp_path}/c"]


def test_the_newest_step_of_each_task_counts_and_a_task_is_replaced_whole(tmp_path):
    first, later = scores_file(tmp_path, 5), scores_file(tmp_path, 100)
    write_scores(first, [score("a", "acc", 0.25, 0.1), score("a", "acc_norm", 0.5)], "step-00000005")
    write_scores(first, [score("b", "exact_match,strict", 1.0)], "step-00000005")
    write_scores(later, [score("a", "acc", 0.75, 0.2, 100)], "step-00000100")
    found = newest_scores(tmp_path)
    assert [(one.key, one.value, one.stderr, one.step) for one in found] == [
        ("benchmark/a/acc", 0.75, 0.2, 100),
        ("benchmark/b/exact_match,strict", 1.0, None, 5),
    ]
    assert found[0].about == {"num_fewshot": 0, "limit": None}
    write_scores(first, [score("a", "f1", 0.1)], "step-00000005")
    assert set(json.loads(first.read_text())["tasks"]["a"]["metrics"]) == {"f1"}
    assert newest_scores(tmp_path / "none") == []


def test_a_task_is_named_once_in_a_table():
    rows = score_rows([score("a", "acc", 0.25, 0.1), score("a", "f1", 12345.5), score("b", "acc", 1)])
    assert rows == [
        ("a", "acc", "0.2500", "± 0.1000"),
        ("", "f1", "12345.5000", ""),
        ("b", "acc", "1.0000", ""),
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", "[" * 100000),
        '{"tasks": {"a": {}}, "step": 1}',
        '{"tasks": {"a": {"metrics": {"m": 1}}}, "step": 1}',
        '{"tasks": {"a": {"metrics": {"m": {"value": "x", "stderr": null}}}}, "step": 1}',
    ],
)
def test_another_file_is_refused(tmp_path, text):
    path = scores_file(tmp_path, 1)
    path.parent.mkdir()
    path.write_text(text)
    for use in (lambda: newest_scores(tmp_path), lambda: write_scores(path, [score("a", "acc", 1)], "x")):
        with pytest.raises(ConfigError, match="holds no scores of benchmarks"):
            use()
    assert path.read_text() == text
