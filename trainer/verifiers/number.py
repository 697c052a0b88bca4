"""number: the last number of the completion is that of the row."""

import re
from decimal import Context, Decimal
from typing import Any

from trainer.verifiers.verdict import Verdict, boxed, field

# ASCII digits only: Python's \d and float() would also take those of other scripts. A sign after a digit, a
# letter or a bracket is an operator, as in 10-4.
_NUMBER = re.compile(
    r"(?:(?<![0-9A-Za-z)\]}])[-+\u2212])?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,4}(?![0-9A-Za-z]))?"
)


def verify(fields: dict[str, Any], completion: str, options: dict[str, Any]) -> Verdict:
    r"""1 if the last number, of \boxed{} if there is one, is within `tolerance` of the answer.

    Raises ValueError if the answer of the row, or what of it follows its last ####, is not one number.
    """
    answer = field(fields, options["answer_key"])
    right = _numbers(str(answer).rpartition("####")[2])
    if len(right) != 1:
        law = "must hold one number, after #### if that is there; for others use kind: math"
        raise ValueError(f"{options['answer_key']}={answer!r} of the row {law}")
    inside = boxed(completion)
    numbers = _numbers(completion if inside is None else inside)
    if not numbers:
        return Verdict(0, "no number")
    found, expected = numbers[-1], right[0]
    if found == expected or _distance(found, expected) <= Decimal(str(options["tolerance"])):
        return Verdict(1, f"{found:.12g} is right")
    return Verdict(0, f"{found:.12g} is not {expected:.12g}")


def _numbers(text: str) -> list[Decimal]:
    return [Decimal(of.replace(",", "").replace("\u2212", "-")) for of in _NUMBER.findall(text)]


def _distance(one: Decimal, other: Decimal) -> Decimal:
    """The absolute difference, with digits for any tolerance that means something."""
    return abs(Context(prec=100).subtract(one, other))
