"""The small tasks: right answers, no prompt in a conversation, the same in every process."""

import hashlib
import json
import re
from collections import Counter
from typing import Any

import pytest

from data_pipeline import chat, samples
from data_pipeline.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def taught() -> list[dict[str, Any]]:
    return [json.loads(text) for text in samples.documents("task_chat")]


@pytest.fixture(scope="module")
def asked() -> list[dict[str, Any]]:
    return [json.loads(text) for text in samples.documents("task_prompts")]


def right_answer(question: str) -> tuple[str, str]:
    """The task of a question, and its answer, from its words alone."""
    if sum_of := re.fullmatch(r"What is (\d+) \+ (\d+)\?", question):
        return "add", str(int(sum_of[1]) + int(sum_of[2]))
    if digits := re.fullmatch(r"Sort the digits of (\d{4})\.", question):
        return "sort", "".join(sorted(digits[1]))
    count = re.fullmatch(r"How often is ([123]) in ([123]{7})\?", question)
    assert count, question
    return "count", str(count[2].count(count[1]))


def test_prompts_have_right_answers(asked: list[dict[str, Any]]) -> None:
    assert [right_answer(row["prompt"]) for row in asked] == [(row["task"], row["answer"]) for row in asked]
    assert Counter(row["task"] for row in asked) == {"add": 2000, "sort": 2000, "count": 2000}


def test_conversations_teach_right_answers(taught: list[dict[str, Any]]) -> None:
    thoughts = []
    for row in taught:
        [question, answer] = row["messages"]
        task, right = right_answer(question["content"])
        assert answer["content"] == f"Answer: {right}"
        if thought := answer.get("reasoning_content"):
            thoughts.append(task)
            for left, sum_of in re.findall(r"(\d+ \+ \d+) = (\d+)", thought):
                assert eval(left) == int(sum_of)
            last = re.findall(r"\d+", thought)[-1]
            if task == "sort":
                pairs = re.findall(r"(\d): (\d)", thought)
                assert "".join(digit * int(times) for digit, times in pairs) == right
            else:
                assert last == right
    assert Counter(thoughts) == {"add": 2000, "sort": 2000, "count": 2000}
    assert len(taught) == 12_000


def test_no_prompt_is_taught_and_none_is_there_twice(
    taught: list[dict[str, Any]], asked: list[dict[str, Any]]
) -> None:
    questions = {row["messages"][0]["content"] for row in taught}
    prompts = {row["prompt"] for row in asked}
    assert (len(questions), len(prompts)) == (12_000, 6000)
    assert not questions & prompts


def test_the_same_everywhere() -> None:
    """Prepared folders and runs of other machines rely on it."""
    digests = [
        hashlib.sha256("\n".join(samples.documents(name)).encode()).hexdigest()[:16]
        for name in ("task_chat", "task_prompts")
    ]
    assert digests == ["03306a5a2430c1d6", "2f2f579b6fa33794"]


def test_a_digit_is_a_token(asked: list[dict[str, Any]]) -> None:
    tokenizer = Tokenizer(train_tokenizer([row["prompt"] for row in asked], 600), "trained")
    for row in asked[:300]:
        tokens = [tokenizer.decode([i]) for i in tokenizer.encode(f"{row['prompt']} Answer: {row['answer']}")]
        assert all(len(token) == 1 for token in tokens if re.search(r"\d", token))


def test_every_row_is_a_good_row(taught: list[dict[str, Any]], asked: list[dict[str, Any]]) -> None:
    assert all(len(chat.samples(row, None)) == 1 for row in taught)
    assert all(chat.prompt(row["prompt"], row) for row in asked)
