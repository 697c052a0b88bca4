"""The tables of hand-written faults: tests/mutants/moe/balance.toml holds those of moe/balance.py.

A table names the tests of its file, `tests`, and lists faults, each with
    what   what is wrong, in a few words
    old    text that the file contains exactly once
    new    what it is replaced by
    tests  optional: the tests that must fail, if they are not those of the table
"""

import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


class Mutant(NamedTuple):
    """A file of the product with one change."""

    file: str  # relative to the root of the repository
    what: str
    source: str  # the whole file after the change
    tests: str  # arguments of pytest, of which at least one test must fail
    generated: bool = False

    @property
    def kind(self) -> str:
        """Under which of page.KINDS its result is stored."""
        return "generated" if self.generated else "by hand"


class Table(NamedTuple):
    """The faults of one file of the product."""

    file: str
    tests: str
    faults: list[Mutant]


def tables() -> list[Table]:
    """All tables. Raises ValueError for a fault whose `old` is not in its file exactly once."""
    return [_read(path) for path in sorted(HERE.rglob("*.toml"))]


def _read(path: Path) -> Table:
    found = tomllib.loads(path.read_text())
    stem = path.relative_to(HERE).with_suffix("")
    file = next(
        str(name) for name in (stem.with_suffix(".py"), stem.with_suffix(".sh")) if (ROOT / name).exists()
    )
    source = (ROOT / file).read_text()
    faults = []
    for fault in found["fault"]:
        what, old = fault["what"], fault["old"]
        if source.count(old) != 1 or old == fault["new"]:
            raise ValueError(
                f"{path.name}: {what}: `old` is {source.count(old)} times in {file}, or equals `new`"
            )
        changed = source.replace(old, fault["new"])
        faults.append(Mutant(file, what, changed, fault.get("tests", found["tests"])))
    return Table(file, found["tests"], faults)
