"""math: the completion's expression equals the row's, by the package math-verify."""

import logging
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
from math_verify import verify as equal

from trainer.verifiers.verdict import Verdict, boxed, field

# It would warn that its own time limits, by signals, are off: the limit of the worker's process holds.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def verify(fields: dict[str, Any], completion: str, options: dict[str, Any]) -> Verdict:
    r"""1 if the last expression, of the last \boxed{} if there is one, equals the answer as mathematics.

    Raises ValueError if the answer of the row is no expression.
    """
    answer = str(field(fields, options["answer_key"]))
    expected = _parsed(answer if "$" in answer else f"${answer}$")
    if not expected:
        raise ValueError(f"{options['answer_key']}={answer!r} of the row is no expression")
    inside = boxed(completion)  # math-verify would make a set of several
    found = _parsed(completion if inside is None else f"${inside}$")
    if not found:
        return Verdict(0, "no expression")
    if equal(expected, found, timeout_seconds=None):
        return Verdict(1, f"{found[-1]} is right")
    return Verdict(0, f"{found[-1]} is not {expected[-1]}")


def _parsed(text: str) -> list[Any]:
    """The expression as sympy sees it, and as it is written; empty if there is none."""
    return parse(text, [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None)
