"""What all verifiers share: their result, and how they read the row and the completion."""

from typing import Any, NamedTuple

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
    r"""What the last complete \boxed{...} holds, inner braces included; None if there is none."""
    start = text.rfind(r"\boxed{")
    while start >= 0:
        depth, begin = 1, start + len(r"\boxed{")
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[begin:end].strip()
        start = text.rfind(r"\boxed{", 0, start)
    return None
