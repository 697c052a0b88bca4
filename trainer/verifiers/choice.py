"""choice: the letter that the completion chooses is that of the row."""

import re
from typing import Any

from trainer.verifiers.verdict import Verdict, field

# The forms of a choice. A letter within a sentence is none: "I" and "A" are words.
_CHOICE = re.compile(
    r"""
      (?i:answer|choice|option)(?i:\ is)?[\s:=*]*\(?(?P<named>[A-J])(?![A-Za-z])
    | \\boxed\{[\s({]*(?:\\(?:text|textbf|mathrm|mathbf)\{[\s(]*)?(?P<boxed>[A-J])(?![A-Za-z])
    | \((?P<bracket>[A-J])\)
    | ^[\ \t*]*(?P<alone>[A-J])[\ \t*.)]*$
    """,
    re.VERBOSE | re.MULTILINE,
)


def verify(fields: dict[str, Any], completion: str, options: dict[str, Any]) -> Verdict:
    r"""1 if the last choice ("Answer: B", "\boxed{B}", "(B)", a line that is only B) is the answer's letter.

    Raises ValueError if the answer of the row is no letter from A to J.
    """
    answer = str(field(fields, options["answer_key"])).strip()
    if not re.fullmatch("[A-J]", answer):
        raise ValueError(f"{options['answer_key']}={answer!r} of the row is no letter from A to J")
    choices = [match[match.lastgroup or 0] for match in _CHOICE.finditer(completion)]
    if not choices:
        return Verdict(0, "no choice")
    return Verdict(float(choices[-1] == answer), f"chose {choices[-1]}")
