"""format: thoughts and answer are where they belong."""

import re
from typing import Any

from trainer.verifiers.verdict import Verdict, without_end


def verify(fields: dict[str, Any], completion: str, options: dict[str, Any]) -> Verdict:
    """1 if the tags of thoughts are as `think` asks, and an answer follows that `pattern` matches fully.

    required: one <think>...</think>, with which the completion begins; forbidden: no tag; optional: either.
    """
    text, think = without_end(completion), options["think"]
    answer = text
    if "<think>" in text or "</think>" in text:
        thoughts, _, answer = text.removeprefix("<think>").partition("</think>")
        if think == "forbidden":
            return Verdict(0, "a tag of thoughts")
        if not text.startswith("<think>") or re.search("</?think>", thoughts + answer):
            return Verdict(0, "not one <think>...</think> at the start")
    elif think == "required":
        return Verdict(0, "no thoughts")
    if not answer.strip():
        return Verdict(0, "no answer")
    if options["pattern"] and not re.fullmatch(options["pattern"], answer.strip()):
        return Verdict(0, "the answer does not match the pattern")
    return Verdict(1, "well-formed")
