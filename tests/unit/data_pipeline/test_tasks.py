"""The small tasks: right answers, no prompt in a conversation, the same in every process."""

import hashlib
import json
import re
from collections import Counter
from typing import Any

import pytest

from data_pipeline import chat, forms, samples
from data_pipeline.config import SourceConfig


@pytest.fixture(scope="module")
def taught() -> list[dict[str, Any]]:
    return [json.loads(text) for text in samples.documents("task_chat")]


@pytest.fixture(scope="module")
def asked() -> list[dict[str, Any]]:
    return [json.loads(text) for text in samples.documents("task_prompts")]


def right_answer(question: str) -> tuple[str, str]:
    """The task of a question, and its answer, from its words alone."""
    first, *second = map(int, re.findall(r"\d", question))
    if second:
        assert "larger" in question
        return "compare", "yes" if first > second[0] else "no"
    assert "even" in question
    return "even", "yes" if first in (0, 2, 4, 6, 8) else "no"


def test_prompts_have_right_answers(asked: list[dict[str, Any]]) -> None:
    for row in asked:
        question = row["prompt"].removesuffix(" /no_think")
        assert question != row["prompt"]
        task, answer = right_answer(question)
        assert (row["task"], row["answer"], row["enable_thinking"]) == (task, f"Answer: {answer}", False)
    tasks = Counter(row["task"] for row in asked)
    assert tasks.total() == 320
    assert 15 < tasks["even"] < 55
    answers = Counter(row["answer"] for row in asked)
    assert abs(answers["Answer: yes"] - 160) < 36, "no answer is right much more often (four deviations)"


def test_conversations_teach_a_right_answer_and_two_others(taught: list[dict[str, Any]]) -> None:
    answers: dict[str, list[str]] = {}
    for row in taught:
        [question, answer] = row["messages"]
        answers.setdefault(question["content"], []).append(answer["content"])
    assert len(answers) == 1280
    for question, given in answers.items():
        right = f"Answer: {right_answer(question)[1]}"
        assert given == [right, "Answer: yes or no", "I do not know."]


def test_no_prompt_is_taught_and_none_is_there_twice(
    taught: list[dict[str, Any]], asked: list[dict[str, Any]]
) -> None:
    questions = {row["messages"][0]["content"] for row in taught}
    prompts = {row["prompt"].removesuffix(" /no_think") for row in asked}
    assert (len(questions), len(prompts)) == (1280, 320)
    assert not questions & prompts


def test_the_same_everywhere() -> None:
    """Prepared folders and runs of other machines rely on it."""
    digests = [
        hashlib.sha256("\n".join(samples.documents(name)).encode()).hexdigest()[:16]
        for name in ("task_chat", "task_prompts")
    ]
    assert digests == ["a769fbb9278feb79", "082a1419db1904f5"]


def test_every_row_is_a_good_row(taught: list[dict[str, Any]], asked: list[dict[str, Any]]) -> None:
    assert all(len(chat.samples(row, None)) == 1 for row in taught)
    assert all(chat.prompt(forms.read(row, SourceConfig("prompts", [])).row, False) for row in asked)
