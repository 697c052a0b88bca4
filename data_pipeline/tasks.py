"""Small questions whose answers a program checks, as conversations and as prompts.

Is a digit even or odd, is one digit larger or smaller than another? Each question of the conversations has
three answers: the right one, one that hedges, one that refuses. So a model learns the form and the facts, but
answers rightly less than half of the time: the rest is for rewards to teach.
"""

import json
from collections.abc import Iterator
from typing import NamedTuple

from data_pipeline.permutation import Permutation, derive_key

_ABOUT_ONE = (
    *("Is {a} {kind}?", "Is the number {a} {kind}?", "Tell me if {a} is {kind}.", "{a}: is it {kind}?"),
    *("Would you call {a} {kind}?", "Say whether {a} is {kind}.", "Is {a} an {kind} number?"),
    *(
        "Can {a} be {kind}?",
        "{a} is {kind}, is it not?",
        "Check whether {a} is {kind}.",
        "Is {kind} right of {a}?",
    ),
    *("Do you know if {a} is {kind}?", "Please say if {a} is {kind}.", "Look at {a}: {kind}?"),
    *("Find out if {a} is {kind}.", "I ask you if {a} is {kind}."),
)
_ABOUT_TWO = (
    *("Is {a} {kind} than {b}?", "Tell me if {a} is {kind} than {b}.", "{a} and {b}: is the first {kind}?"),
    *("Say whether {a} is {kind} than {b}.", "Check whether {a} is {kind} than {b}."),
    *("Would you call {a} {kind} than {b}?", "{a} is {kind} than {b}, is it not?"),
    *("Compare {a} with {b}: is it {kind}?", "Can {a} be {kind} than {b}?", "{a}: is it {kind} than {b}?"),
    *("Do you know if {a} is {kind} than {b}?", "Please say if {a} is {kind} than {b}."),
    *("Look at {a} and {b}: is the first {kind}?", "Is the number {a} {kind} than {b}?"),
    *("Find out if {a} is {kind} than {b}.", "I ask you if {a} is {kind} than {b}."),
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
        for kind in ("even", "odd"):
            answer = "yes" if (a % 2 == 0) == (kind == "even") else "no"
            found += [_Question("even", text.format(a=a, kind=kind), answer) for text in _ABOUT_ONE]
        for b in range(10):
            for kind in ("larger", "smaller") if a != b else ():
                answer = "yes" if (a > b) == (kind == "larger") else "no"
                found += [
                    _Question("compare", text.format(a=a, b=b, kind=kind), answer) for text in _ABOUT_TWO
                ]
    permutation = Permutation(len(found), derive_key(0, "tasks"))
    return [found[permutation(number)] for number in range(len(found))]
