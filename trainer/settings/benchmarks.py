"""Benchmarks of lm-eval: their keys and laws, and their results in a run folder. Torch-free."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.manifest import to_json, write_atomically
from moe.config import ConfigError
from trainer.settings.typed import AtLeast0, AtLeast1


@dataclass
class BenchmarksConfig:
    """Tasks of lm-eval that run during training, and how; also after the last step."""

    tasks: list[str]  # names that lm-eval knows, YAML files, or folders of such files
    every_steps: AtLeast0  # 0 = never
    limit: int | None  # at most so many documents of a task; null = all
    num_fewshot: int | None  # examples before each question; null = as the task says
    include: list[str]  # folders with YAML files of more tasks
    rows_at_once: AtLeast1  # texts that a rank scores or continues at once

    @property
    def wanted(self) -> bool:
        """Whether any task is to run."""
        return bool(self.tasks) and self.every_steps > 0

    def problems(self, prefix: str = "evaluate.benchmarks.") -> list[str]:
        """Broken laws, each with its key after `prefix`."""
        found = []
        if self.every_steps and not self.tasks:
            what = f"{prefix}every_steps={self.every_steps} has no tasks to run"
            found.append(f"{what}; name them: {prefix}tasks=[hellaswag], or use 0")
        if twice := sorted({task for task in self.tasks if self.tasks.count(task) > 1}):
            found.append(f"{prefix}tasks names {', '.join(twice)} twice; name each once")
        if self.limit is not None and self.limit < 1:
            found.append(f"{prefix}limit={self.limit} is below 1; use 1 or more, or null for all documents")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            found.append(f"{prefix}num_fewshot={self.num_fewshot} is below 0; use 0 or more, or null")
        for path in self.include:
            if not os.path.isdir(path):
                found.append(f"{prefix}include: {path} is no folder; name folders with YAML files of tasks")
        for task in self.tasks:
            if is_path(task) and not os.path.exists(task):
                found.append(
                    f"{prefix}tasks: there is no {task}; name a task, a YAML file, or a folder of them"
                )
        return found

    def absolute(self) -> dict[str, list[str]]:
        """The keys that hold paths, with absolute ones: a run may be started in another folder."""
        tasks = [str(Path(task).resolve()) if is_path(task) else task for task in self.tasks]
        return {"tasks": tasks, "include": [str(Path(path).resolve()) for path in self.include]}

    def paths(self) -> list[Path]:
        """The files and folders that hold tasks, absolute."""
        given = [*self.include, *(task for task in self.tasks if is_path(task))]
        return [Path(path).resolve() for path in given]


def is_path(task: str) -> bool:
    """Whether a task is told by a file or a folder: it has a slash or ends as YAML files do."""
    return os.sep in task or task.endswith((".yaml", ".yml"))


class Score(NamedTuple):
    """A metric of a task, and how it was measured."""

    task: str
    metric: str  # lm-eval's; with its filter, if that is not `none`: exact_match,strict-match
    value: float
    stderr: float | None
    step: int | None  # of the checkpoint
    about: dict[str, Any]  # version, num_fewshot, limit, samples, chat, lm_eval

    @property
    def key(self) -> str:
        """Its name among the metrics of a run."""
        return f"benchmark/{self.task}/{self.metric}"


def write_scores(path: Path, scores: list[Score], checkpoint: str) -> None:
    """Write scores of one checkpoint into a file, beside those of other tasks that it has.

    Raises ConfigError if the file is there and is not one of these.
    """
    tasks = _read(path)["tasks"] if path.exists() else {}
    tasks = {name: of for name, of in tasks.items() if name not in {score.task for score in scores}}
    for score in scores:
        of_task = tasks.setdefault(score.task, {"metrics": {}, **score.about})
        of_task["metrics"][score.metric] = {"value": score.value, "stderr": score.stderr}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_json({"checkpoint": checkpoint, "step": scores[0].step, "tasks": tasks}))


def scores_file(run_dir: Path, step: int) -> Path:
    """Where the scores of a step are in a run folder."""
    return run_dir / "benchmarks" / f"step-{step:08d}.json"


def newest_scores(run_dir: Path) -> list[Score]:
    """The scores of the newest step of each task that the run folder has, by name.

    Raises ConfigError for a file that cannot be read.
    """
    found: dict[str, list[Score]] = {}
    for path in sorted((run_dir / "benchmarks").glob("step-*.json")):
        of_step: dict[str, list[Score]] = {}
        for score in _scores(path):
            of_step.setdefault(score.task, []).append(score)
        found |= of_step
    return [score for task in sorted(found) for score in found[task]]


def _scores(path: Path) -> Iterator[Score]:
    kept = _read(path)
    for task, of in kept["tasks"].items():
        about = {key: value for key, value in of.items() if key != "metrics"}
        for metric, one in of["metrics"].items():
            yield Score(task, metric, one["value"], one["stderr"], kept["step"], about)


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_bytes())
        values = [one for of in kept["tasks"].values() for one in of["metrics"].values()]
        numbers = [one["value"] for one in values] + [one["stderr"] or 0 for one in values]
        if not all(isinstance(number, int | float) for number in [*numbers, kept["step"] or 0]):
            raise ValueError("a value is no number")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        remedy = "move it away, or name another file"
        raise ConfigError(f"{path} holds no scores of benchmarks ({error!r}); {remedy}") from error
    return kept


def score_rows(scores: list[Score]) -> list[tuple[str, str, str, str]]:
    """Task, metric, value and standard error of each score, for a table; a task is named once."""
    rows, before = [], ""
    for score in scores:
        error = "" if score.stderr is None else f"± {score.stderr:.4f}"
        rows.append((score.task if score.task != before else "", score.metric, f"{score.value:.4f}", error))
        before = score.task
    return rows
