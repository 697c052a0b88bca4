"""Small tasks whose answers a program checks: sums, sorting, counting. As conversations and as prompts.

A permutation of all instances of a task says which are taught and which are asked, so that no prompt stands
in a conversation. A digit is a token of its own for Qwen's tokenizers, and for those trained here.
"""

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data_pipeline.permutation import Permutation, derive_key

_TAUGHT, _ASKED = 4000, 2000  # instances of each task


class _Instance(NamedTuple):
    question: str
    reasoning: str
    answer: str


def _add(number: int) -> _Instance:
    """Two numbers below 100."""
    a, b = divmod(number, 100)
    ones, tens = a % 10 + b % 10, (a // 10 + b // 10) * 10
    steps = (
        f"{a % 10} + {b % 10} = {ones}, {a // 10 * 10} + {b // 10 * 10} = {tens}, {tens} + {ones} = {a + b}"
    )
    return _Instance(f"What is {a} + {b}?", steps, str(a + b))


def _sort(number: int) -> _Instance:
    """Four digits; the reasoning says how often each one is there."""
    digits = f"{number:04d}"
    steps = ", ".join(f"{digit}: {digits.count(digit)}" for digit in sorted(set(digits)))
    return _Instance(f"Sort the digits of {digits}.", steps, "".join(sorted(digits)))


def _count(number: int) -> _Instance:
    """Seven digits from 1 to 3; the reasoning counts along."""
    digit, digits = str(number % 3 + 1), "".join(str(number // 3**place % 3 + 1) for place in range(1, 8))
    steps = ", ".join(f"{of}: {digits[: place + 1].count(digit)}" for place, of in enumerate(digits))
    return _Instance(f"How often is {digit} in {digits}?", steps, str(digits.count(digit)))


_TASKS: dict[str, tuple[Callable[[int], _Instance], int]] = {  # with the number of instances
    "add": (_add, 100**2),
    "sort": (_sort, 10**4),
    "count": (_count, 3**8),
}


def conversations() -> Iterator[str]:
    """JSON of conversations that teach the tasks, one after another; every second answer has reasoning."""
    for number in range(_TAUGHT):
        for _, instance in _instances(number):
            answer = {"role": "assistant", "content": f"Answer: {instance.answer}"}
            if number % 2:
                answer["reasoning_content"] = instance.reasoning
            yield json.dumps({"messages": [{"role": "user", "content": instance.question}, answer]})


def prompts() -> Iterator[str]:
    """JSON of other instances: `prompt`, `answer`, and `task`, the name of the task."""
    for number in range(_TAUGHT, _TAUGHT + _ASKED):
        for task, instance in _instances(number):
            yield json.dumps({"prompt": instance.question, "answer": instance.answer, "task": task})


def _instances(number: int) -> Iterator[tuple[str, _Instance]]:
    """Instance `number` of each task, in an order that is the same everywhere."""
    for task, (make, size) in _TASKS.items():
        yield task, make(Permutation(size, derive_key(0, task))(number))
