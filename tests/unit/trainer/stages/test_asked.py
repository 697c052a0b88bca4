"""How the texts of benchmarks become what a model reads."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.templated import Qwen3
from data_pipeline.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer
from trainer.stages.asked import Asked, Reader, generation_problems
from trainer.stages.orders import Writing


class Noted:
    """Keeps the pairs that it is asked to score, and continues every prompt with the same tokens."""

    said: Sequence[int] = ()

    def score(self, pairs: list[Any]) -> list[tuple[float, bool]]:
        self.pairs = pairs
        return [(0.0, True)] * len(pairs)

    def write(self, writing: Writing) -> list[list[int]]:
        return [list(self.said)] * len(writing.requests)


@pytest.fixture
def reader() -> Reader:
    """Of a model that reads six tokens."""
    tokenizer = Tokenizer(train_tokenizer(["to ask is to learn"] * 3, 400), "here")
    return Reader(tokenizer, END_OF_TEXT, END_OF_TEXT, 6, Qwen3())


def test_contexts_are_cut_on_the_left_and_none_is_the_prefix(reader: Reader) -> None:
    """The last token of a continuation is scored, but not read."""
    noted: Any = Noted()
    asked, prefix = Asked(reader, noted), reader.tokenizer.end_of_text
    asked._loglikelihood_tokens([("", [], [5]), ("", [1, 2, 3, 4, 5, 6], [7, 8]), ("", [1], [2])])
    assert noted.pairs == [([prefix], [5]), ([2, 3, 4, 5, 6], [7, 8]), ([1], [2])]


def test_an_answer_that_is_begun_is_continued(reader: Reader) -> None:
    asked = Asked(reader, Noted())  # type: ignore[arg-type]
    said = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because"}]
    begun = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert asked.apply_chat_template(said[:1]) == begun
    assert asked.apply_chat_template(said, add_generation_prompt=False) == f"{begun}Because"


def test_control_tokens_are_no_text_of_a_completion(reader: Reader) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    noted: Any = Noted()
    noted.said = [*reader.tokenizer.encode("to"), reader.tokenizer.control_id("<|im_start|>")]
    noted.said += reader.tokenizer.encode(" ask.is")
    asked = Asked(reader, noted)
    request = SimpleNamespace(args=("learn", {"until": ["."], "max_gen_toks": 3}))
    assert asked.generate_until([request]) == ["to ask"]


def test_what_a_task_may_ask_of_generation() -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    assert not list(generation_problems({"until": ["\n"], "max_gen_toks": 5, "num_beams": 1}, 6))
    found = list(generation_problems({"until": ["\n"], "max_gen_toks": 6, "num_beams": 2}, 6))
    assert "max_gen_toks=6 leaves no room for a question; the model reads 6 tokens at most" in found[0]
    assert "generation_kwargs.num_beams=2 is not supported" in found[1]
