"""The order of rows: quotas, every row exactly once per epoch, budgets."""

import bisect
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import BLOCK_ROWS, DataError
from data_pipeline.mixture import Mixture, MixtureSource, integer_quotas, skip_rows


def mixture(seed: int = 0, changes: dict | None = None, **sources: tuple) -> Mixture:
    """name=(weight, rows[, max_epochs])."""
    made = {name: MixtureSource(*(*fields, None)[:3], row_tokens=64.0) for name, fields in sources.items()}
    return Mixture(made, seed, changes)


def rows_available(mixed: Mixture) -> int | None:
    """The number of rows before a source is exhausted, found with check_budget."""

    def is_over(total: int) -> bool:
        try:
            mixed.check_budget(total)
        except DataError:
            return True
        return False

    return bisect.bisect_left(range(10**7), True, key=is_over) - 1 if is_over(10**7) else None


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), total=st.integers(1, 20_000))
def test_quotas_are_within_one_of_the_share(weights: list[float], total: int) -> None:
    quotas = integer_quotas(weights, total)
    assert sum(quotas) == total
    for quota, weight in zip(quotas, weights, strict=True):
        assert abs(quota - weight * total / sum(weights)) < 1


def test_rows_left_over_go_to_the_largest_remainders() -> None:
    assert integer_quotas([0.6, 0.3, 0.1], 7) == [4, 2, 1]  # shares 4.2, 2.1, 0.7
    assert integer_quotas([1.0, 1.0, 1.0], 8) == [3, 3, 2]


@settings(max_examples=15, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 20), min_size=1, max_size=5),
    block=st.integers(0, 10**9),
    seed=st.integers(0, 2**32),
)
def test_a_block_and_its_stretches_hold_the_weights(weights: list[float], block: int, seed: int) -> None:
    mixed = mixture(seed, **{f"s{i}": (weight, 1000) for i, weight in enumerate(weights)})
    shares = {f"s{i}": weight / sum(weights) for i, weight in enumerate(weights)}
    start = block * BLOCK_ROWS
    counts: Counter[str] = Counter()
    for slot in range(BLOCK_ROWS):
        counts[mixed.locate(start + slot).source] += 1
        if slot % 1000 == 999:  # the bound: one row per source, plus the rounding of the quota
            for name, share in shares.items():
                assert abs(counts[name] - share * (slot + 1)) < 2 + len(weights)
    for name, share in shares.items():
        assert abs(counts[name] - share * BLOCK_ROWS) < 1


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.integers(1, 200), min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_every_row_once_per_epoch_and_epochs_in_order(rows: list[int], seed: int) -> None:
    mixed = mixture(seed, **{f"s{i}": (i + 1.0, n) for i, n in enumerate(rows)})
    seen: dict[str, list[tuple[int, int]]] = {name: [] for name in mixed._names}
    for g in range(1500):
        source, epoch, row = mixed.locate(g)
        seen[source].append((epoch, row))
    for i, n in enumerate(rows):
        of_source = seen[f"s{i}"]
        for epoch in range(len(of_source) // n):
            part = of_source[epoch * n : (epoch + 1) * n]
            assert sorted(part) == [(epoch, row) for row in range(n)]


def test_epochs_have_orders_of_their_own_across_blocks() -> None:
    n = BLOCK_ROWS // 2 + 77  # an epoch ends within a block
    mixed = mixture(a=(1.0, n))
    orders = [[mixed.locate(epoch * n + i).row for i in range(n)] for epoch in (0, 1, 2)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_the_order_is_a_pure_function_of_names_weights_and_seed() -> None:
    one = mixture(5, a=(1.0, 50), b=(2.0, 70), unused=(0.0, 0))
    two = mixture(5, b=(4.0, 70), a=(2.0, 50))
    other_seed = mixture(6, a=(1.0, 50), b=(2.0, 70))
    rows = [40_000, 3, BLOCK_ROWS, 16_383, 3]
    assert [one.locate(g) for g in rows] == [two.locate(g) for g in rows]
    assert [one.locate(g) for g in range(50)] != [other_seed.locate(g) for g in range(50)]


def test_needed_rows_are_those_that_are_dealt() -> None:
    mixed = mixture(a=(0.9, 50), b=(0.1, 70))
    for total in (0, 1, 999, BLOCK_ROWS + 5):
        dealt = Counter(mixed.locate(g).source for g in range(total))
        assert mixed.rows_needed(total) == {"a": dealt["a"], "b": dealt["b"]}


@pytest.mark.parametrize("limits", [(2.0, None), (None, 1.5), (700.0, 1.0)])
def test_budget_ends_exactly_where_a_source_is_exhausted(limits: tuple) -> None:
    mixed = mixture(a=(3.0, 100, limits[0]), b=(1.0, 90, limits[1]))
    available = rows_available(mixed)
    assert available is not None
    mixed.check_budget(available)
    mixed.locate(available - 1)
    with pytest.raises(DataError, match=r"data\.sources\.[ab]\.max_epochs="):
        mixed.check_budget(available + 1)
    with pytest.raises(DataError, match="max_epochs"):
        mixed.locate(available)


def test_budget_names_every_exhausted_source_with_both_numbers() -> None:
    mixed = mixture(a=(1.0, 10, 1.0), b=(1.0, 20, 1.0))
    with pytest.raises(DataError) as error:
        mixed.check_budget(1000)
    assert "data.sources.a.max_epochs=1.0 allows 10 rows" in str(error.value)
    assert "data.sources.b.max_epochs=1.0 allows 20 rows" in str(error.value)
    assert str(error.value).count("need 500") == 2


def test_no_limit_and_no_rows() -> None:
    assert rows_available(mixture(a=(1.0, 10))) is None
    with pytest.raises(DataError, match=r"data\.sources empty: no whole row"):
        mixture(a=(1.0, 10), empty=(1.0, 0))


def test_weights_are_shares_of_the_tokens() -> None:
    """Rows of `sparse` hold a third of the tokens of `full`: equal shares need three times as many rows."""
    sources = {"full": MixtureSource(1.0, 90, None, 96.0), "sparse": MixtureSource(1.0, 90, None, 32.0)}
    needed = Mixture(sources, 0).rows_needed(BLOCK_ROWS)
    assert needed == {"full": BLOCK_ROWS // 4, "sparse": BLOCK_ROWS * 3 // 4}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_shares_of_tokens_follow_weights_and_sizes(alpha: float) -> None:
    sizes = {"large": 1600 * 64.0, "padded": 400 * 16.0, "raised": 100 * 64.0}  # rows x tokens of a row
    sources = {
        "large": MixtureSource(1.0, 1600, None, 64.0),
        "padded": MixtureSource(1.0, 400, None, 16.0),
        "raised": MixtureSource(2.0, 100, None, 64.0),
    }
    needed = Mixture(sources, 0, alpha=alpha).rows_needed(BLOCK_ROWS)
    tokens = {name: rows * sources[name].row_tokens for name, rows in needed.items()}
    wanted = {name: sources[name].weight * size**alpha for name, size in sizes.items()}
    for name in sizes:
        share = wanted[name] / sum(wanted.values())
        assert tokens[name] / sum(tokens.values()) == pytest.approx(share, rel=2e-3)


def test_a_source_that_would_never_be_read_is_refused() -> None:
    sources = {"large": MixtureSource(1.0, 10**9, None, 64.0), "small": MixtureSource(1.0, 10, None, 64.0)}
    Mixture(sources, 0, alpha=0.4)
    with pytest.raises(DataError, match=r"data\.sources small: less than one row in 16384 would be read"):
        Mixture(sources, 0, alpha=1.0)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(1, 150), min_size=3, max_size=3),
    changes=st.dictionaries(
        st.integers(1, 1200),
        st.dictionaries(st.sampled_from("abc"), st.floats(0.1, 9), min_size=1),
        max_size=3,
    ),
    seed=st.integers(0, 2**32),
)
def test_changed_weights_lose_and_repeat_no_row(rows: list[int], changes: dict, seed: int) -> None:
    mixed = mixture(seed, changes, **{name: (1.0, n) for name, n in zip("abc", rows, strict=True)})
    seen: dict[str, list[tuple[int, int]]] = {name: [] for name in mixed._names}
    for g in range(1500):
        if g in changes or g == 1499:
            assert mixed.rows_needed(g) == {name: len(found) for name, found in seen.items()}
        source, epoch, row = mixed.locate(g)
        seen[source].append((epoch, row))
    for name, n in zip("abc", rows, strict=True):
        for epoch in range(len(seen[name]) // n):
            part = seen[name][epoch * n : (epoch + 1) * n]
            assert sorted(part) == [(epoch, row) for row in range(n)]


def test_weights_change_at_their_row() -> None:
    changes = {1000: {"a": 3.0}, 21_000: {"a": 0.0, "late": 1.0}}
    mixed = mixture(3, changes, a=(1.0, 50), b=(1.0, 70), late=(0.0, 10))
    plain = mixture(3, None, a=(1.0, 50), b=(1.0, 70), late=(0.0, 10))
    assert [mixed.locate(g) for g in range(1000)] == [plain.locate(g) for g in range(1000)]
    counts = [
        Counter(mixed.locate(g).source for g in span) for span in (range(1000, 17_384), range(21_000, 37_384))
    ]
    assert counts[0] == {"a": 12_288, "b": 4096}
    assert counts[1] == {"late": 8192, "b": 8192}


@pytest.mark.parametrize("limit", [4.0, 12.0, 13.0, 30.0])
def test_budget_over_changed_weights(limit: float) -> None:
    mixed = mixture(1, {500: {"a": 9.0}, 20_000: {"a": 0.0}}, a=(1.0, 1000, limit), b=(1.0, 70))
    available = rows_available(mixed)
    needed = mixed.rows_needed(25_000)["a"]
    assert (available is None) == (needed <= limit * 1000)
    if available is None:
        mixed.locate(10**9)
        return
    assert mixed.locate(available - 1)
    with pytest.raises(DataError, match=r"data\.sources\.a\.max_epochs"):
        mixed.locate(available)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=5))
def test_skipped_rows_leave_out_the_ranges_and_nothing_else(steps: list[tuple[int, int]]) -> None:
    skip, at = [], 0
    for gap, length in steps:
        skip.append([at + gap, at + gap + length])
        at += gap + length
    left_out = {row for first, end in skip for row in range(first, end)}
    expected = [row for row in range(200) if row not in left_out]
    assert [skip_rows(row, skip) for row in range(len(expected))] == expected


def test_seeds_and_blocks_have_orders_of_their_own() -> None:
    one = {"a": MixtureSource(1.0, 5000, None, 10.0)}
    first, second = ([Mixture(one, seed).locate(row).row for row in range(50)] for seed in (0, 1))
    assert first != second
    mixture = Mixture(one | {"b": MixtureSource(1.0, 5000, None, 10.0)}, 0)
    rows = [mixture.locate(row).source for row in range(2 * BLOCK_ROWS)]
    assert rows[:BLOCK_ROWS] != rows[BLOCK_ROWS:]


def test_a_budget_between_two_rows_ends_with_the_row_before() -> None:
    mixture = Mixture({"a": MixtureSource(1.0, 10, 1.55, 10.0)}, 0)
    mixture.check_budget(15)
    with pytest.raises(DataError, match="allows 15 rows"):
        mixture.check_budget(16)
