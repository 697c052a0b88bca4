"""The rewards of completions, from processes that a rank can lose without harm. Torch-free."""

from collections import deque
from typing import Any, NamedTuple

from trainer.settings.rl import OPTIONS, VerifierConfig
from trainer.verifiers.process import Part, Worker, exchange
from trainer.verifiers.verdict import answer_of


class Score(NamedTuple):
    """The mean of the verifiers' rewards by weight, and what each says, by its name."""

    reward: float
    parts: dict[str, Part]


class Scorer:
    """Scores samples in `workers` processes, which start when they are needed and stay until `close`.

    On Linux a worker ends with the thread that started it: call `score` from a thread that lasts.
    """

    def __init__(self, verifiers: dict[str, VerifierConfig], workers: int) -> None:
        self._verifiers = verifiers
        self._workers: list[Worker | None] = [None] * workers

    def score(self, samples: list[tuple[dict[str, Any], str]]) -> list[Score]:
        """The scores of (fields of the prompt's row, completion), in their order.

        A check that takes longer than its `seconds`, raises, ends its process or returns no reward from 0 to
        1 is a part with reward 0 and `failed`. Raises OSError if no process can be started.
        """
        parts: list[dict[str, Part]] = [{} for _ in samples]
        waiting = deque((index, name) for index in range(len(samples)) for name in self._verifiers)
        busy: dict[Worker, tuple[int, str]] = {}
        try:
            while waiting or busy:
                for worker in self._idle(busy, len(waiting)):
                    index, name = busy[worker] = waiting.popleft()
                    worker.begin(self._job(name, *samples[index]), self._verifiers[name].seconds)
                exchange(list(busy))
                over = [(worker, part) for worker in busy if (part := worker.outcome()) is not None]
                for worker, part in over:
                    index, name = busy.pop(worker)
                    parts[index][name] = part
        except BaseException:
            self.close()  # what is under way would answer the next call
            raise
        return [self._score(of) for of in parts]

    def close(self) -> None:
        """End the workers. A later `score` starts others."""
        for slot, worker in enumerate(self._workers):
            if worker is not None:
                worker.end()
                self._workers[slot] = None

    def _idle(self, busy: dict[Worker, tuple[int, str]], count: int) -> list[Worker]:
        """At most `count` workers that can take a check; those that have ended are replaced."""
        found: list[Worker] = []
        for slot, worker in enumerate(self._workers):
            if len(found) == count:
                break
            if worker in busy:
                continue
            if worker is None or not worker.is_alive():
                if worker is not None:
                    worker.end()
                worker = self._workers[slot] = Worker()
            found.append(worker)
        return found

    def _job(self, name: str, fields: dict[str, Any], completion: str) -> dict[str, Any]:
        kind, options = self._verifiers[name].kind, self._verifiers[name].options or {}
        return {
            "function": kind if ":" in kind else f"trainer.verifiers.{kind}:verify",
            "fields": fields,
            "completion": completion if kind == "format" else answer_of(completion),
            "options": {**OPTIONS.get(kind, {}), **options},
        }

    def _score(self, parts: dict[str, Part]) -> Score:
        weights = {name: config.weight for name, config in self._verifiers.items()}
        reward = sum(weight * parts[name].reward for name, weight in weights.items())
        return Score(reward / sum(weights.values()), {name: parts[name] for name in weights})
