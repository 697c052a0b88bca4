"""Multi-token prediction, router jitter and capacity give the same results under every layout of ranks."""

import pytest
from harness import run_ranks
from layouts import FAMILY, MTP, Outcome, deviation, run_many, train_oracle

TOLERANCE = 1e-5
# ZeRO stage, ep_size, rows of a micro-batch, more overrides
LAYOUTS = [
    (1, 2, 8, []),
    (2, 2, 4, []),
    (3, 2, 4, ["recompute=full"]),
    (3, 1, 2, ["recompute=experts"]),
    (0, 2, 2, ["recompute=full"]),  # keeps its forwards until the counts are known
]
AHEAD = {
    "qwen3": [*FAMILY["qwen3"], MTP],
    "qwen3_moe": [*FAMILY["qwen3_moe"], MTP, "model.tie_word_embeddings=false"],
    "qwen3_next": [*FAMILY["qwen3_next"], MTP],
}
# weights large enough that the choice of experts affects the loss
LARGE = ["model.initializer_range=0.3"]
JITTER = [*LARGE, "experts.router_jitter_noise=0.2"]
CAPACITY = ["experts.capacity_factor=0.8", *JITTER]


def layout(stage: int, ep_size: int, rows: int, more: list[str]) -> list[str]:
    return [f"deepspeed=zero{stage}", f"parallel.ep_size={ep_size}", f"micro_batch_size={rows}", *more]


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, list[Outcome]]:
    """The outcomes of each variant under its layouts on two ranks, which are started only once."""
    runs, names = [], []
    for name, model in AHEAD.items():
        for stage, ep_size, rows, more in LAYOUTS if name == "qwen3_moe" else LAYOUTS[2:3]:
            dense = "model.num_experts=0" in model
            runs.append([*model, *layout(stage, 1 if dense else ep_size, rows, more)])
            names.append(name)
    runs += [[*JITTER, MTP, *layout(*one)] for one in LAYOUTS]
    names += ["jitter"] * len(LAYOUTS)
    same_rows = [(stage, ep_size, 4, more) for stage, ep_size, _, more in LAYOUTS]
    runs += [[*CAPACITY, MTP, *layout(*one)] for one in same_rows]
    names += ["capacity"] * len(same_rows)
    outcomes = run_ranks(run_many, 2, runs, timeout=550)[0]
    return {
        name: [outcome for mine, outcome in zip(names, outcomes, strict=True) if mine == name]
        for name in names
    }


@pytest.fixture(scope="module")
def one_rank() -> list[Outcome]:
    """On one rank: with jitter, with capacity and jitter, and with neither."""
    runs = [[*more, MTP, *layout(1, 1, 4, [])] for more in (JITTER, CAPACITY, LARGE)]
    return run_ranks(run_many, 1, runs, timeout=280)[0]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", AHEAD)
def test_looking_ahead_equals_the_oracle(two_ranks, name):
    oracle = train_oracle(*AHEAD[name])
    assert len(oracle["mtp_losses"]) == 3
    assert any(key.startswith("mtp.") for key in oracle["parameters"])
    for outcome in two_ranks[name]:
        worst = deviation(outcome, oracle)
        assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["jitter", "capacity"])
def test_what_training_alone_has_does_not_depend_on_the_layout(two_ranks, one_rank, name):
    """The noise depends only on the row, dropped slots only on the rows of a micro-batch, not on the rank."""
    expected = one_rank[["jitter", "capacity"].index(name)]
    assert deviation(one_rank[2], expected)["losses"] > 1e-3  # the variant has an effect
    for outcome in two_ranks[name]:
        worst = deviation(outcome, expected)
        assert max(worst.values()) < TOLERANCE, worst
