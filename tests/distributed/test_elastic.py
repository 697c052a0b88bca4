"""A checkpoint of any layout can be resumed under any other, and the trajectory stays the same."""

from itertools import product
from pathlib import Path

import pytest
from commands import prepare_corpus
from harness import run_ranks
from layouts import ROWS, Outcome, SmallRun
from test_layouts import deviation

from trainer.checkpoints.folder import damage
from trainer.checkpoints.saving import Checkpoints

TOLERANCE = 1e-5
SAVED, STEPS = 2, 7  # saved after 2 steps, then 5 more
LAYOUTS = [
    (world_size, ep_size, stage)
    for world_size, ep_size, stage in product((1, 2, 4), (1, 2, 4), (0, 1, 2, 3))
    if ep_size <= world_size
]
FAR = [(4, 2, 3), (2, 2, 1), (4, 4, 2), (2, 1, 3), (4, 4, 1), (2, 2, 0), (4, 1, 3), (2, 1, 2)]


def overrides(layout: tuple[int, int, int], data: str) -> list[str]:
    world_size, ep_size, stage = layout
    rows = 2 if stage % 2 else 4  # so that the number of micro-batches also differs
    return [
        f"deepspeed=zero{stage}",
        f"parallel.ep_size={ep_size}",
        f"micro_batch_size={min(rows, ROWS // world_size)}",
        "balance.bias_update_rate=0.01",
        "checkpoint.background=false",
        f"data.dir={data}",
    ]


def folder(root: str, layout: tuple[int, int, int]) -> Path:
    return Path(root, "-".join(map(str, layout)))


def checkpoints_of(run: SmallRun, run_dir: Path) -> Checkpoints:
    return Checkpoints(run_dir, 1, run.config, run.plan, run.ranks, print)


def save_each(layouts: list[tuple[int, int, int]], root: str, data: str) -> None:
    for layout in layouts:
        run = SmallRun(*overrides(layout, data))
        run.train(range(SAVED))
        checkpoints_of(run, folder(root, layout)).save(run.engine, run.balance, SAVED, {})
        run.engine.close()


def go_on(moves: list[tuple], root: str, data: str) -> list[Outcome]:
    """For each (target, source): the outcome of the target's steps after the source's checkpoint."""
    outcomes = []
    for target, sources in moves:
        run = SmallRun(*overrides(target, data))
        for source in sources:
            assert checkpoints_of(run, folder(root, source)).load_latest(run.engine, run.balance) == (
                SAVED,
                {},
            )
            outcomes.append(run.train(range(SAVED, STEPS)))
        run.engine.close()
    return outcomes


def undisturbed(data: str) -> Outcome:
    run = SmallRun(*overrides((1, 1, 0), data))
    run.train(range(SAVED))
    return run.train(range(SAVED, STEPS))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prepared data folder, because a checkpoint copies its tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    prepare_corpus(folder)
    return f"{folder}/prepared"


@pytest.fixture(scope="module")
def expected(data: str) -> Outcome:
    return run_ranks(undisturbed, 1, data)[0]


def check_moves(moves: list[tuple], root: Path, data: str, expected: Outcome) -> None:
    """`moves`: (target, sources). Each source layout first writes its checkpoint."""
    sources = {source for _, chosen in moves for source in chosen}
    for world_size in (1, 2, 4):
        mine = sorted(layout for layout in sources if layout[0] == world_size)
        if mine:
            run_ranks(save_each, world_size, mine, str(root), data, timeout=280)
    for source in sources:
        assert damage(folder(str(root), source) / f"checkpoints/step-{SAVED:08d}") == []
    for world_size in (1, 2, 4):
        mine = [(target, chosen) for target, chosen in moves if target[0] == world_size]
        names = [(source, target) for target, chosen in mine for source in chosen]
        outcomes = run_ranks(go_on, world_size, mine, str(root), data, timeout=1500)[0] if mine else []
        for name, outcome in zip(names, outcomes, strict=True):
            worst = deviation(outcome, expected)
            assert max(worst.values()) < TOLERANCE, (name, worst)


def test_far_moves(tmp_path, data, expected):
    """Each layout of FAR resumes from the one before it: 2 and 4 ranks, all stages, both directions."""
    moves = [(target, [FAR[position - 1]]) for position, target in enumerate(FAR)]
    check_moves(moves, tmp_path, data, expected)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_move(tmp_path, data, expected):
    check_moves([(target, LAYOUTS) for target in LAYOUTS], tmp_path, data, expected)
