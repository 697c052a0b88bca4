"""`make mutants`, or `python tests/mutants/mutants.py [PART OF A NAME ...]`: which faults are noticed?

Each mutant is the product with one fault: those written by hand in the tables of this folder, and for each
file `--generated` changes, drawn from those that cosmic-ray can make (another operator, number, condition,
...). The tests of the file run on a copy of the repository. A mutant survives if they pass. The score
and the survivors are written into docs/mutants.json and docs/testing.md.
"""

import argparse
import ast
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from cosmic_ray.ast import get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from faults import ROOT, Mutant, Table, tables
from page import PAGE, known, write_page

BUILD = ROOT / "build" / "mutants"
PATIENCE = 60.0  # seconds that a mutant may run beyond three times what the tests take without a fault
FAILED, CANNOT_BE_COLLECTED = 1, (2, 3, 4, 5)  # exit codes of pytest


class Outcome(NamedTuple):
    """What became of a mutant."""

    mutant: Mutant
    result: str  # caught, survived, or broken (the tests could not even be collected)


class Copy:
    """A copy of the repository in which one mutant at a time is tested."""

    def __init__(self) -> None:
        BUILD.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(dir=BUILD))
        listed = subprocess.check_output(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT)
        for name in filter(None, listed.decode().split("\0")):
            if (ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name)

    def test(self, tests: str, seconds: float) -> int | None:
        """pytest's exit code for `tests`, which stop at the first failure; None if they take longer."""
        # the tests of a whole folder would wait for a hanging one for five minutes
        options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", "--timeout", str(int(seconds))]
        command = [sys.executable, "-m", "pytest", *options, *shlex.split(tests)]
        environment = os.environ | {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONDONTWRITEBYTECODE": "1"}  # a change within a second would not be noticed
        log = (self.folder / "pytest.log").open("wb")
        with (
            log,
            subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            ) as process,
        ):
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                os.killpg(process.pid, 9) if process.poll() is None else None

    def judge(self, mutant: Mutant, seconds: float) -> Outcome:
        """Test one mutant."""
        path = self.folder / mutant.file
        whole = path.read_text()
        path.write_text(mutant.source)
        try:
            code = self.test(mutant.tests, seconds)
        finally:
            path.write_text(whole)
        result = "survived" if code == 0 else "broken" if code in CANNOT_BE_COLLECTED else "caught"
        return Outcome(mutant, result)


def generated(table: Table, count: int, seed: int) -> list[Mutant]:
    """Up to `count` different changes of the file of a table, drawn from all that cosmic-ray can make."""
    source = (ROOT / table.file).read_text()
    if count == 0 or not table.file.endswith(".py"):
        return []
    tree, places = get_ast(source), []
    for name in operator_names():
        if get_operator(name).arguments() or name.endswith(("_Is", "_IsNot")):
            continue  # it renames given variables, or `==` becomes `is`, which is no fault for most operands
        operator = get_operator(name)()
        found = (list(operator.mutation_positions(node)) for node in _nodes(tree))
        places += [(name, number) for number in range(sum(map(len, found)))]
    random.Random(f"{seed} {table.file}").shuffle(places)
    seen, mutants = {None, _without_types(source)}, []
    for name, number in places:
        if len(mutants) == count:
            break
        changed = mutate_code(source, get_operator(name)(), number) or source
        if (behaviour := _without_types(changed)) not in seen:
            seen.add(behaviour)
            before, after = _lines(source, changed)
            what = f"`{before.strip()}` becomes `{after.strip()}`"
            mutants.append(Mutant(table.file, what, changed, table.tests, generated=True))
    return mutants


def _nodes(tree: "object") -> Iterator["object"]:
    yield tree
    for child in getattr(tree, "children", ()):
        yield from _nodes(child)


def _without_types(source: str) -> str | None:
    """The syntax tree without type hints, a change of which is no fault; None for what cannot be parsed."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        for hint in {"annotation", "returns"} & set(node._fields):
            setattr(node, hint, None)
    return ast.dump(tree)


def _lines(source: str, changed: str) -> tuple[str, str]:
    """The first line that differs, before and after."""
    pairs = zip(source.splitlines(), changed.splitlines(), strict=False)
    return next((before, after) for before, after in pairs if before != after)


def main(arguments: list[str]) -> int:
    """The command line; the exit code is 1 if a fault that was written by hand is not caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="only those whose `FILE: FAULT` contains one of these")
    parser.add_argument("--generated", type=int, default=8, help="drawn for each file (8)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    parser.add_argument("--new", action="store_true", help="only those without a result so far")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="tested at once (cores)")
    given = parser.parse_args(arguments)
    drawn = [m for t in tables() for m in (*t.faults, *generated(t, given.generated, given.seed))]
    asked = given.names or [""]
    mutants = [m for m in drawn if any(part in f"{m.file}: {m.what}" for part in asked)]
    results = known()
    if given.new:
        mutants = [m for m in mutants if m.what not in results[m.file][m.kind]]
    print(f"{len(mutants)} mutants", flush=True)
    for file in {mutant.file for mutant in mutants if mutant.generated and not given.new}:
        of_this_draw = {mutant.what for mutant in drawn if mutant.file == file}
        kept = {what: of for what, of in results[file]["generated"].items() if what in of_this_draw}
        results[file]["generated"] = kept
    missed = []
    for mutant, result in judge_all(mutants, [Copy() for _ in range(given.workers)]):
        results[mutant.file][mutant.kind][mutant.what] = result
        write_page(results)  # what is known is kept if the command is stopped
        missed += [(mutant, result)] if result != "caught" else []
    for mutant, result in missed:
        print(f"{result}: {mutant.file}: {mutant.what}")
    print(f"{len(mutants) - len(missed)} of {len(mutants)} are caught; see {PAGE.relative_to(ROOT)}")
    return int(any(not mutant.generated for mutant, _ in missed))


def judge_all(mutants: list[Mutant], copies: list[Copy]) -> Iterator[Outcome]:
    """What became of each mutant, as soon as it is known. Raises ValueError if tests fail without a fault."""
    free, local, started = list(copies), threading.local(), time.monotonic()

    def mine() -> Copy:
        if not hasattr(local, "copy"):
            local.copy = free.pop()
        return local.copy

    def baseline(tests: str) -> tuple[str, float]:
        began = time.monotonic()
        if (code := mine().test(tests, 600)) != 0:
            raise ValueError(f"without any fault, {tests} ends with {code}: {mine().folder}/pytest.log")
        return tests, time.monotonic() - began

    with ThreadPoolExecutor(len(copies)) as pool:
        usual = dict(pool.map(baseline, dict.fromkeys(mutant.tests for mutant in mutants)))
        print(f"their tests pass without a fault, in {sum(usual.values()):.0f} s", flush=True)
        jobs = [pool.submit(lambda m=m: mine().judge(m, 3 * usual[m.tests] + PATIENCE)) for m in mutants]
        for done, job in enumerate(as_completed(jobs), 1):
            mutant, result = job.result()
            left = (time.monotonic() - started) / done * (len(mutants) - done)
            head = f"{done}/{len(mutants)}, {left / 60:.0f} min left: {result:<8}"
            print(f"{head} {mutant.file}: {mutant.what}", flush=True)
            yield Outcome(mutant, result)
    for copy in copies:
        shutil.rmtree(copy.folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
