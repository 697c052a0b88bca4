"""Benchmarks of EleutherAI's lm-eval on our model. Only this file and asked.py import lm_eval.

lm-eval runs on rank 0 alone, with its tasks, their data and the code of a user's own tasks; all ranks run the
model for it (orders.py).
"""

import io
import logging
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.config import DataError
from moe.config import ConfigError
from moe.model import ModelOutput
from trainer.ranks.runtime import Ranks, random_state, set_random_state
from trainer.settings.benchmarks import BenchmarksConfig, Score
from trainer.settings.typed import similar
from trainer.stages.asked import Asked, Reader, generation_problems
from trainer.stages.orders import Orders, Room

NEEDED = "the package lm-eval, which is not installed ({}); pip install '.[benchmark]'"
_SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # lm-eval's own
_BOOTSTRAPS = 1000  # resamples for the error of a metric that has no formula


class Benchmarks:
    """Tasks, ready to run: their mistakes are told here, on all ranks, and nothing is downloaded later.

    where: what is before the name of a key in messages. say: prints a line on the progress of longer work.
    """

    def __init__(
        self,
        config: BenchmarksConfig,
        reader: Reader,
        ranks: Ranks,
        room: Room,
        say: Callable[[str], object],
        where: str = "evaluate.benchmarks.",
    ) -> None:
        self._config, self._reader, self._ranks, self._where = config, reader, ranks, where
        self._room, self._say = room, say
        self._tasks: dict[str, Any] = {"tasks": {}, "groups": {}}
        ranks.from_main(self._load)

    @property
    def every_steps(self) -> int:
        """The steps of training between two runs."""
        return self._config.every_steps

    @property
    def writes(self) -> bool:
        """Whether this rank writes what they found."""
        return self._ranks.is_main

    def run(self, model: Callable[..., ModelOutput], bias: Tensor | None, step: int | None) -> list[Score]:
        """The scores of the tasks after `step`, on all ranks, for a model as in `Orders`.

        Raises ConfigError for a task that fails. The random generators are left as they were.
        """
        of_model = (model, bias, self._reader.tokenizer)
        orders = Orders(*of_model, self._ranks, self._room, self._say)
        return orders.run(lambda: self._scores(self.measure(orders), step))

    def measure(self, orders: Orders, log_samples: bool = False) -> dict[str, Any]:
        """What lm-eval's `evaluate` returns; on rank 0, inside of `orders.run`."""
        from lm_eval.api.model import TemplateLM
        from lm_eval.evaluator import evaluate

        chat = self._reader.template is not None
        asked: Any = type("Asked", (Asked, TemplateLM), {})(self._reader, orders)
        with _undisturbed():
            for task in self._tasks["tasks"].values():
                task.set_fewshot_seed(_SEEDS["fewshot"])  # the same examples each time
            try:
                return evaluate(
                    asked,
                    self._tasks,
                    limit=self._config.limit,
                    bootstrap_iters=_BOOTSTRAPS,
                    log_samples=log_samples,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                )
            except (ConfigError, DataError):
                raise
            except Exception as error:  # tasks hold code of their own
                if orders.failed:
                    raise
                logging.exception("lm-eval failed")
                names = ", ".join(self._tasks["tasks"])
                what = f"{self._where}tasks: lm-eval cannot run {names} ({type(error).__name__}: {error})"
                raise ConfigError(f"{what}; correct the task, or its data") from error

    def _load(self) -> None:
        """Load the tasks and their data. Raises ConfigError with all that cannot be loaded."""
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ConfigError(f"{self._where}tasks needs {NEEDED.format(error)}") from error
        with _undisturbed():
            include = [Path(path) for path in self._config.include]
            specs, problems = _specs(self._config.tasks, include, self._where)
            known = TaskManager(include_path=include, include_defaults=False)
            if any(name not in known.task_index for name in specs if not Path(name).is_file()) or any(
                _is_group(name, known) for name in specs
            ):
                self._say("reading the list of lm-eval's tasks")  # 15,000 files
                known = TaskManager(include_path=include)
            for spec in specs:
                problems += self._load_task(spec, known)
            problems += [
                f"{self._where}tasks: {name}: {law}"
                for name, task in self._tasks["tasks"].items()
                for law in _task_problems(task, self._reader.max_length)
            ]
        if problems:
            raise ConfigError(problems)

    def _load_task(self, spec: str, known: Any) -> list[str]:
        """Add a task, or all of a group; returns problems."""
        if spec not in known.task_index and not Path(spec).is_file():
            remedy = f"`lm-eval ls tasks` lists them{_unread(self._config.include)}"
            return [
                f"{self._where}tasks: lm-eval knows no task {spec}{similar(spec, known.all_tasks)}; {remedy}"
            ]
        try:
            found = known.load([spec])
            for task in found["tasks"].values():
                _set_fewshot(task, self._config.num_fewshot)
                len(task.eval_docs)
        except Exception as error:  # of YAML, of data, or of code in it
            why = " ".join(f"{type(error).__name__}: {error}".split())
            remedy = "correct it, or its data; without a network, load its data before"
            return [f"{self._where}tasks: {spec} cannot be loaded ({why}); {remedy}"]
        self._tasks["tasks"] |= found["tasks"]
        self._tasks["groups"] |= found.get("groups", {})
        return []

    def _scores(self, results: dict[str, Any], step: int | None) -> list[Score]:
        from lm_eval import __version__

        scores = []
        for name, of in results["results"].items():
            about = {
                "version": results["versions"].get(name),
                "num_fewshot": results["n-shot"].get(name),
                "limit": self._config.limit,
                "samples": results["n-samples"].get(name, {}).get("effective"),
                "chat": self._reader.template is not None,
                "lm_eval": __version__,
            }
            for key, value in of.items():
                metric, _, filtered = key.partition(",")
                if filtered and not metric.endswith("_stderr") and isinstance(value, int | float):
                    error = of.get(f"{metric}_stderr,{filtered}")
                    shown = metric if filtered == "none" else key
                    of_error = float(error) if isinstance(error, int | float) else None
                    scores.append(Score(name, shown, float(value), of_error, step, about))
        return scores


def _task_problems(task: Any, max_length: int) -> Iterator[str]:
    """Why a task that is loaded cannot run here."""
    if getattr(task, "UNSAFE_CODE", False):
        yield "it runs programs that the model writes, outside of any sandbox; leave it out"
    if getattr(task, "MULTIMODAL", False):
        yield "it has pictures or sound; leave it out"
    if task.OUTPUT_TYPE == "generate_until":
        yield from generation_problems(task.config.generation_kwargs or {}, max_length)


def _specs(tasks: list[str], include: list[Path], where: str) -> tuple[list[str], list[str]]:
    """Each task as a name or a YAML file, with folders replaced by the tasks in them; and problems."""
    from lm_eval.tasks import TaskManager

    specs, problems = list[str](), []
    for task in tasks:
        if not Path(task).is_dir() or os.sep not in task:
            specs.append(task)
            continue
        found = TaskManager(include_path=task, include_defaults=False).all_subtasks
        include.append(Path(task))
        specs += found
        if not found:
            what = f"{where}tasks: {task} holds no YAML file of a task"
            problems.append(f"{what}{_unread([task])}; name another folder")
    return specs, problems


def _is_group(name: str, known: Any) -> bool:
    """Whether a task may name others, which lm-eval may have."""
    if name in known.task_index:
        return name in known.all_groups
    try:
        return bool(re.search(r"^group\s*:", Path(name).read_text(encoding="utf-8", errors="replace"), re.M))
    except OSError:
        return False


def _unread(folders: Sequence[str]) -> str:
    """The YAML files in folders that lm-eval passes over because it cannot read them."""
    from lm_eval.tasks._yaml_loader import load_yaml

    found = []
    for path in (path for folder in folders for path in sorted(Path(folder).glob("**/*.yaml"))):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # of YAML, or a missing `include`
            found.append(f"{path}: {' '.join(str(error).split())}")
    return f"; not read: {'; '.join(found)}" if found else ""


def _set_fewshot(task: Any, wanted: int | None) -> None:
    """As in lm-eval: a task that says 0 keeps it."""
    told = task.get_config("num_fewshot")
    if wanted is not None and told != 0:
        task.set_config(key="num_fewshot", value=wanted)
    elif told is None:
        task.set_config(key="num_fewshot", value=0)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside, lm-eval has its own seeds, prints nothing and starts no process; then all is as before."""
    before = random_state()
    random.seed(_SEEDS["random"])
    np.random.seed(_SEEDS["numpy"])
    torch.manual_seed(_SEEDS["torch"])
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"  # of lm_eval
    nowhere = io.StringIO()
    try:
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        set_random_state(before)
