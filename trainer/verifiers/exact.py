"""exact: the completion is the answer of the row, letter for letter."""

from typing import Any

from trainer.verifiers.verdict import Verdict, field


def verify(fields: dict[str, Any], completion: str, options: dict[str, Any]) -> Verdict:
    """1 if the completion equals the answer, white space at both ends aside."""
    expected, found = str(field(fields, options["answer_key"])).strip(), completion
    if options["ignore_case"]:
        expected, found = expected.casefold(), found.casefold()
    return Verdict(1, "equal") if found == expected else Verdict(0, f"{found!r} is not {expected!r}")
