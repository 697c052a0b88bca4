"""The tables of hand-written faults fit the product, and a fault that the tests miss is found to survive."""

import json
from pathlib import Path

import pytest
from faults import Mutant, tables
from mutants import Copy, _without_types, generated, judge_all
from page import BEGIN, END, PAGE, RESULTS, show

ROOT = Path(__file__).parents[2]
TABLES = {table.file: table for table in tables()}
# The rooms whose claims are the project's; each of these files has a table.
ROOMS = {
    "moe": "attention balance block cache cross_entropy dispatch distillation experts fp8 gated_delta_net "
    "grouping next_token router sampling scores",
    "data_pipeline": "chat claims config documents files forms loader mixture overlap packing permutation "
    "prepare progress prompts readers sandbox shards survey tasks templated",
    "trainer": "evaluate generate train",
    "trainer/settings": "rl",
    "trainer/engine": "engine gradients loss optimizer policy zero3",
    "trainer/stages": "asked completer completions distilled held_out lessons orders reinforced supervised",
    "trainer/monitor": "metrics",
    "trainer/checkpoints": "export folder optimizer_state saving weights",
    "trainer/verifiers": "choice code exact format math number process regex sandbox scorer verdict worker",
}
FILES = [f"{room}/{name}.py" for room, names in ROOMS.items() for name in names.split()] + ["slurm/job.sh"]


def test_each_room_has_faults() -> None:
    assert sorted(TABLES) == sorted(FILES)
    assert sum(len(table.faults) for table in TABLES.values()) >= 150


@pytest.mark.parametrize("file", FILES)
def test_faults_fit_their_file(file: str) -> None:
    table = TABLES[file]
    assert len({fault.what for fault in table.faults}) == len(table.faults)
    for fault in table.faults:
        if file.endswith(".py"):
            compile(fault.source, file, "exec")
        for tests in fault.tests.split():
            assert (ROOT / tests.partition("::")[0]).exists(), f"{fault.what}: {tests}"


def test_the_page_shows_the_last_results() -> None:
    results = json.loads(RESULTS.read_text())
    for table in TABLES.values():
        assert set(results[table.file]["by hand"]) <= {fault.what for fault in table.faults}, (
            "are judged again"
        )
    assert f"{BEGIN}{show(results)}{END}" in PAGE.read_text()


def test_the_run_tells_who_survives() -> None:
    file = "data_pipeline/permutation.py"
    source = (ROOT / file).read_text()
    tests = "tests/unit/data_pipeline/test_permutation.py"
    unharmed = Mutant(file, "nothing is wrong", source + "\n", tests)
    broken = Mutant(file, "no module", source + "\nimport no_such_module\n", tests)
    wrong = TABLES[file].faults[0]
    outcomes = judge_all([unharmed, wrong, broken], [Copy()])
    assert [outcome.result for outcome in outcomes] == ["survived", "caught", "broken"]
    drawn = generated(TABLES[file], 5, seed=0)
    assert len({mutant.source for mutant in drawn}) == 5
    assert drawn == generated(TABLES[file], 5, seed=0) != generated(TABLES[file], 5, seed=1)


def test_a_change_of_type_hints_is_none() -> None:
    source = "def f(x: int, *y: str) -> bool:\n    z: int = x\n    return z > 0\n"
    hints = "def f(x: str, *y: bool) -> int:\n    z: str = x\n    return z > 0\n"
    assert _without_types(source) == _without_types(hints) != _without_types(source.replace("0", "1"))
    assert _without_types("f(%x)") is None, "cosmic-ray changes the star of an argument"
