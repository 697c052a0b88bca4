"""math: the completion's expression equals the row's, by the package math-verify."""

from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
from math_verify import verify as equal

from trainer.verifiers.verdict import Verdict, field


def verify(fields: dict[str, Any], completion: str, options: dict[str, Any]) -> Verdict:
    r"""1 if the last expression, of \boxed{} if there is one, equals the answer as mathematics.

    Raises ValueError if the answer of the row is no expression.
    """
    answer = str(field(fields, options["answer_key"]))
    expected = _parsed(answer) or _parsed(f"${answer}$")
    if not expected:
        raise ValueError(f"{options['answer_key']}={answer!r} of the row is no expression")
    found = _parsed(completion)
    if not found:
        return Verdict(0, "no expression")
    # Its own time limits use signals; the pool's limit ends the process.
    if equal(expected, found, timeout_seconds=None):
        return Verdict(1, f"{found[-1]} is right")
    return Verdict(0, f"{found[-1]} is not {expected[-1]}")


def _parsed(text: str) -> list[Any]:
    """The expression as sympy sees it, and as it is written; empty if there is none."""
    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return parse(text, targets, parsing_timeout=None)
