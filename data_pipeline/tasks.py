"""Small questions whose answers a program checks, as conversations and as prompts.

Is a digit even, is it larger than another? Each question of the conversations has
three answers: the right one, one that hedges, one that refuses. So a model learns the form and the facts, but
answers rightly less than half of the time: the rest is for rewards to teach.
"""

import json
from collections.abc import Iterator
from typing import NamedTuple

from data_pipeline.permutation import Permutation, derive_key

_ABOUT_ONE = (
    *("Is {a} even?", "Is the number {a} even?", "Tell me if {a} is even.", "{a}: is it even?"),
    *("Would you call {a} even?", "Say whether {a} is even.", "Is {a} an even number?"),
    *(
        "Can {a} be even?",
        "{a} is even, is it not?",
        "Check whether {a} is even.",
        "Is even right of {a}?",
    ),
    *("Do you know if {a} is even?", "Please say if {a} is even.", "Look at {a}: even?"),
    *("Find out if {a} is even.", "I ask you if {a} is even."),
)
_ABOUT_TWO = (
    *("Is {a} larger than {b}?", "Tell me if {a} is larger than {b}.", "{a} and {b}: is the first larger?"),
    *("Say whether {a} is larger than {b}.", "Check whether {a} is larger than {b}."),
    *("Would you call {a} larger than {b}?", "{a} is larger than {b}, is it not?"),
    *("Compare {a} with {b}: is it larger?", "Can {a} be larger than {b}?", "{a}: is it larger than {b}?"),
    *("Do you know if {a} is larger than {b}?", "Please say if {a} is larger than {b}."),
    *("Look at {a} and {b}: is the first larger?", "Is the number {a} larger than {b}?"),
    *("Find out if {a} is larger than {b}.", "I ask you if {a} is larger than {b}."),
)
_ASKED = 5  # every fifth question is a prompt
_OTHER_ANSWERS = ("Answer: yes or no", "I do not know.")


class _Question(NamedTuple):
    task: str
    text: str
    answer: str


def conversations() -> Iterator[str]:
    """JSON of conversations: four of five questions, each with a right answer and with two others."""
    for question in (of for number, of in enumerate(_questions()) if number % _ASKED):
        for answer in (f"Answer: {question.answer}", *_OTHER_ANSWERS):
            user = {"role": "user", "content": question.text}
            yield json.dumps({"messages": [user, {"role": "assistant", "content": answer}]})


def prompts() -> Iterator[str]:
    """JSON of the other questions: `prompt`, `answer`, and `task`; to be answered without thoughts."""
    for task, text, answer in _questions()[::_ASKED]:
        row = {"prompt": f"{text} /no_think", "answer": f"Answer: {answer}", "task": task}
        yield json.dumps(row | {"enable_thinking": False})


def _questions() -> list[_Question]:
    """All questions, in an order that is the same everywhere."""
    found = []
    for a in range(10):
        answer = "no" if a % 2 else "yes"
        found += [_Question("even", text.format(a=a), answer) for text in _ABOUT_ONE]
        for b in (other for other in range(10) if other != a):
            answer = "yes" if a > b else "no"
            found += [_Question("compare", text.format(a=a, b=b), answer) for text in _ABOUT_TWO]
    permutation = Permutation(len(found), derive_key(0, "tasks"))
    return [found[permutation(number)] for number in range(len(found))]
