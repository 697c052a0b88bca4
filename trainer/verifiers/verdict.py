"""What all verifiers share: their result, and how they read the row and the completion."""

import re
from typing import Any, NamedTuple

_BRACE = re.compile(r"\\boxed\{|[{}]")
_END_TOKENS = ("<|im_end|>", "<|endoftext|>")


class Verdict(NamedTuple):
    """What a verifier says of a completion: a reward from 0 to 1, and why."""

    reward: float
    reason: str


def field(fields: dict[str, Any], key: str) -> Any:
    """The value of a key of the prompt's row. Raises ValueError if the row lacks it."""
    if fields.get(key) is None:
        raise ValueError(f"the row has no field {key}; its fields are {', '.join(fields)}")
    return fields[key]


def without_end(completion: str) -> str:
    """The completion without the token that ends a turn, and without white space around it."""
    text = completion.strip()
    for token in _END_TOKENS:
        text = text.removesuffix(token).rstrip()
    return text


def answer_of(completion: str) -> str:
    """What follows the thoughts: the text after the last </think>; nothing while a <think> is still open."""
    answer = without_end(completion).rpartition("</think>")[2].strip()
    return "" if "<think>" in answer else answer


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} that is closed holds, inner braces included; None if there is none."""
    opened: list[
        int
    ] = []  # where the braces that are still open begin to hold something, -1 for other braces
    last, found = -1, None
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            opened.append(brace.end() if brace[0] != "{" else -1)
        elif opened and (start := opened.pop()) > last:
            last, found = start, text[start : brace.start()].strip()
    return found
