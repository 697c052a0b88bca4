"""Every architecture on two ranks, under expert parallelism and ZeRO, equals one process."""

import pytest
from harness import run_ranks
from layouts import DENSE, FAMILY, Outcome, deviation, run_many, train_oracle

TOLERANCE = 1e-5
LAYOUTS = [
    ["deepspeed=zero2", "micro_batch_size=4"],
    ["deepspeed=zero3", "micro_batch_size=4", "recompute=full"],
]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Outcome]]:
    """All architectures under all layouts; the ranks are started only once."""
    runs = [
        [*model, *layout, f"parallel.ep_size={1 if DENSE[0] in model else 2}"]
        for model in FAMILY.values()
        for layout in LAYOUTS
    ]
    results = run_ranks(run_many, 2, runs, timeout=550)[0]
    size = len(LAYOUTS)
    return {name: results[i * size : (i + 1) * size] for i, name in enumerate(FAMILY)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FAMILY)
def test_two_ranks_equal_the_oracle(outcomes, name):
    """The oracle is autograd in fp64 in one process, without DeepSpeed."""
    oracle = train_oracle(*FAMILY[name])
    for layout, outcome in zip(LAYOUTS, outcomes[name], strict=True):
        worst = deviation(outcome, oracle)
        assert max(worst.values()) < TOLERANCE, (layout, worst)
