"""Which rows each rank reads, on random layouts, also when a run goes on with another one."""

from itertools import islice

import pytest
from hypothesis import strategies as st

from data_pipeline.config import DataConfig
from data_pipeline.loader import Batch, Loader

SEQ_LEN, SEED = 16, 3
# (ranks, rows of a micro-batch, micro-batches of a rank)
LAYOUTS = [(ranks, rows, count) for ranks in (1, 2, 3, 4) for rows in (1, 2, 3) for count in (1, 2)]


def steps_of(
    config: DataConfig, layout: tuple[int, int, int], next_row: int, steps: int
) -> list[list[Batch]]:
    """For each step, the micro-batches of all ranks."""
    ranks, rows, count = layout
    shape = {"seq_len": SEQ_LEN, "global_batch_size": ranks * rows * count, "micro_batch_size": rows}
    of_ranks = []
    for rank in range(ranks):
        place = {"rank": rank, "world_size": ranks, "seed": SEED, "next_row": next_row}
        with Loader(config, **shape, **place) as loader:
            of_ranks.append(list(islice(loader, steps)))
            assert loader.next_row == next_row + steps * shape["global_batch_size"]
    for batches in [batches for of_rank in of_ranks for batches in of_rank]:
        assert [len(batch.rows) for batch in batches] == [rows] * count
    return [[batch for of_rank in of_ranks for batch in of_rank[step]] for step in range(steps)]


@pytest.mark.fuzzing(25, 400)
def test_each_row_is_read_once_on_any_layouts(fuzz, prepared: DataConfig) -> None:
    contents: dict[int, list[int]] = {}
    pairs = [(a, b) for a in LAYOUTS for b in LAYOUTS if a[0] * a[1] * a[2] == b[0] * b[1] * b[2]]

    @fuzz(st.sampled_from(pairs), st.integers(0, 500), st.integers(1, 2))
    def holds(layouts, first_step, steps):
        size = layouts[0][0] * layouts[0][1] * layouts[0][2]
        for number, layout in enumerate(layouts):
            next_row = (first_step + number * steps) * size
            for step, batches in enumerate(steps_of(prepared, layout, next_row, steps)):
                start = next_row + step * size
                assert sorted(row for batch in batches for row in batch.rows) == [*range(start, start + size)]
                for batch in batches:
                    for row, ids in zip(batch.rows, batch.input_ids.tolist(), strict=True):
                        assert contents.setdefault(row, ids) == ids, "a row does not depend on the layout"
