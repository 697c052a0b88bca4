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
    r"""1 if the last number, of \boxed{} if there is one, is within `tolerance` of the answer's last number.

    Raises ValueError if the answer of the row holds no number.
    """
    answer = field(fields, options["answer_key"])
    expected = _last_number(str(answer))
    if expected is None:
        raise ValueError(f"{options['answer_key']}={answer!r} of the row holds no number")
    inside = boxed(completion)
    found = _last_number(completion if inside is None else inside)
    if found is None:
        return Verdict(0, "no number")
    if found == expected or _distance(found, expected) <= Decimal(str(options["tolerance"])):
        return Verdict(1, f"{found:.12g} is right")
    return Verdict(0, f"{found:.12g} is not {expected:.12g}")


def _last_number(text: str) -> Decimal | None:
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "").replace("\u2212", "-")) if numbers else None


def _distance(one: Decimal, other: Decimal) -> Decimal:
    """The absolute difference, with digits for any tolerance that means something."""
    return abs(Context(prec=100).subtract(one, other))
