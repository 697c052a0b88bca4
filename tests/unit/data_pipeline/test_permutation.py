"""The computed permutation is bijective for every n."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.permutation import MASK, Permutation, derive_key, mix


def assert_bijective(n: int, key: int) -> None:
    permutation = Permutation(n, key)
    assert sorted(map(permutation, range(n))) == list(range(n))


@given(n=st.integers(1, 2000), key=st.integers(0, 2**64 - 1))
def test_bijective(n: int, key: int) -> None:
    assert_bijective(n, key)


@pytest.mark.parametrize("n", [65535, 65536, 65537])
def test_bijective_for_large_n(n: int) -> None:
    assert_bijective(n, derive_key(n))


@given(n=st.integers(1, 1 << 62), key=st.integers(0, 2**64 - 1), data=st.data())
def test_images_stay_in_range(n: int, key: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    permutation = Permutation(n, key)
    images = [permutation(i) for i in indices]
    assert all(0 <= image < n for image in images)
    assert len(set(images)) == len(set(indices))


def test_it_shuffles_and_keys_differ() -> None:
    n = 10_000
    permutations = [Permutation(n, derive_key(seed)) for seed in (1, 2)]
    first, second = (np.array([of(i) for i in range(n)], dtype=float) for of in permutations)
    identity = np.arange(n)
    for a, b in ((first, identity), (second, identity), (first, second), (first[1:], first[:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.04  # four standard deviations of random orders


def test_mix_is_that_of_splitmix64() -> None:
    """The first numbers for the seed 1234567, as the authors' C code gives them."""
    states = [(1234567 + turn * 0x9E3779B97F4A7C15) & MASK for turn in range(1, 4)]
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix(state) for state in states] == expected
    assert mix(np.array(states, dtype=np.uint64)).tolist() == expected
