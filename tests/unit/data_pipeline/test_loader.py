"""The same global batches for any number of ranks, resumed at any step; reading ahead never hangs."""

import itertools
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.config import DataConfig, DataError
from data_pipeline.loader import Batch, Loader
from data_pipeline.manifest import Manifest
from data_pipeline.shards import TokenStream

SEQ_LEN, GLOBAL_BATCH, SEED = 32, 12, 7


def make(
    config: DataConfig, rank: int = 0, world_size: int = 1, micro: int = 12, **changes: object
) -> Loader:
    options = {"seq_len": SEQ_LEN, "global_batch_size": GLOBAL_BATCH, "seed": SEED, **changes}
    return Loader(config, micro_batch_size=micro, rank=rank, world_size=world_size, **options)


def take(loader: Loader, steps: int) -> list[list[Batch]]:
    with loader:
        return [next(loader) for _ in range(steps)]


def by_row(batches: list[Batch]) -> dict[int, tuple]:
    """Global row -> what the row holds, its borders counted from its start."""
    rows = {}
    for batch in batches:
        borders = batch.cu_seqlens.tolist()
        for slot, row in enumerate(batch.rows):
            start, stop = slot * SEQ_LEN, (slot + 1) * SEQ_LEN
            assert start in borders
            assert stop in borders
            assert row not in rows
            rows[row] = (
                batch.input_ids[slot].tolist(),
                batch.labels[slot].tolist(),
                batch.position_ids[slot].tolist(),
                batch.token_mask[slot].tolist(),
                [border - start for border in borders if start <= border <= stop],
            )
    return rows


def test_shapes_and_types(prepared: DataConfig) -> None:
    [[batch]] = take(make(prepared), 1)
    assert batch.rows == tuple(range(GLOBAL_BATCH))
    for tensor in (batch.input_ids, batch.labels, batch.position_ids):
        assert tensor.shape == (GLOBAL_BATCH, SEQ_LEN)
        assert tensor.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.cu_seqlens[0], batch.cu_seqlens[-1]) == (0, GLOBAL_BATCH * SEQ_LEN)
    assert batch.token_mask.dtype == torch.bool
    moved = batch.to("meta")
    assert moved.rows == batch.rows
    assert all(value.is_meta for value in vars(moved).values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(
    ("world_size", "micro"), [(1, 1), (1, 4), (2, 1), (2, 6), (3, 2), (3, 4), (4, 1), (4, 3), (12, 1)]
)
def test_global_batches_do_not_depend_on_the_ranks(prepared: DataConfig, world_size: int, micro: int) -> None:
    steps = 5
    expected = [by_row(batches) for batches in take(make(prepared), steps)]
    ranks = [take(make(prepared, rank, world_size, micro), steps) for rank in range(world_size)]
    for step in range(steps):
        micro_batches = [batch for rank in ranks for batch in rank[step]]
        assert by_row(micro_batches) == expected[step]
        for r, rank in enumerate(ranks):  # the formula that the checkpoints of others rely on
            for m, batch in enumerate(rank[step]):
                first = step * GLOBAL_BATCH + m * world_size * micro + r * micro
                assert batch.rows == tuple(range(first, first + micro))


@pytest.mark.parametrize("stop", [0, 1, 3, 7])
def test_resume_is_one_integer_at_any_world_size(prepared: DataConfig, stop: int) -> None:
    whole = [by_row(batches) for batches in take(make(prepared), 9)]
    before = make(prepared, 0, 2, 3)
    take(before, stop)
    assert before.next_row == stop * GLOBAL_BATCH
    ranks = [take(make(prepared, rank, 4, 1, next_row=before.next_row), 9 - stop) for rank in range(4)]
    after = [by_row([batch for rank in ranks for batch in rank[step]]) for step in range(9 - stop)]
    assert after == whole[stop:]


def test_rows_are_the_tokens_of_their_sources(prepared: DataConfig) -> None:
    """One epoch of one source holds every span of its training tokens once."""
    only = {name: replace(s, weight=float(name == "letters")) for name, s in prepared.sources.items()}
    config = replace(prepared, sources=only)
    record = Manifest.load(Path(config.dir)).sources["letters"].splits["train"]
    stream = TokenStream(Path(config.dir), record.shards)
    tokens = stream.read(0, len(stream)).tolist()
    stream.close()
    rows = (len(tokens) - 1) // SEQ_LEN
    inputs: dict[tuple, int] = {}
    for batches in take(make(config, micro=1, global_batch_size=1), rows):
        [batch] = batches
        key = (*batch.input_ids[0].tolist(), *batch.labels[0].tolist())
        inputs[key] = inputs.get(key, 0) + 1
    expected: dict[tuple, int] = {}
    end = Manifest.load(Path(config.dir)).tokenizer.end_of_text
    for row in range(rows):
        span = tokens[row * SEQ_LEN : (row + 1) * SEQ_LEN + 1]
        labels = [-100 if a == end else b for a, b in itertools.pairwise(span)]
        key = (*span[:-1], *labels)
        expected[key] = expected.get(key, 0) + 1
    assert inputs == expected


@pytest.mark.parametrize(("world_size", "micro"), [(1, 12), (4, 1)])
def test_validation_is_read_once_in_plain_order(prepared: DataConfig, world_size: int, micro: int) -> None:
    for source, record in Manifest.load(Path(prepared.dir)).sources.items():
        stream = TokenStream(Path(prepared.dir), record.splits["validation"].shards)
        tokens = stream.read(0, len(stream)).tolist()
        stream.close()
        ranks = [
            list(make(prepared, rank, world_size, micro, split="validation", source=source))
            for rank in range(world_size)
        ]
        assert (
            len({tuple(len(step) for step in rank) for rank in ranks}) == 1
        )  # or the ranks would wait forever
        rows = by_row([batch for rank in ranks for step in rank for batch in step])
        assert sorted(rows) == list(range(len(rows)))
        assert len(rows) % GLOBAL_BATCH == 0
        assert len(rows) - GLOBAL_BATCH < -(-(len(tokens) - 1) // SEQ_LEN) <= len(rows)
        read, padding = [], []
        for row in sorted(rows):
            input_ids, labels, _, mask, _ = rows[row]
            read += [token for token, real in zip(input_ids, mask, strict=True) if real]
            padding += [label for label, real in zip(labels, mask, strict=True) if not real]
        assert read == tokens[:-1]
        assert padding
        assert set(padding) == {-100}


def test_validation_rows_are_counted_with_the_padded_last(prepared: DataConfig) -> None:
    for source, record in Manifest.load(Path(prepared.dir)).sources.items():
        tokens = record.splits["validation"].tokens
        for seq_len in (tokens - 2, tokens - 1, tokens, 32):
            loader = make(
                prepared, seq_len=seq_len, micro=1, global_batch_size=1, split="validation", source=source
            )
            assert loader.rows_available() == -(-(tokens - 1) // seq_len)
            steps = list(loader)
            assert len(steps) == loader.rows_available()
            assert sum(int(batch.token_mask.sum()) for [batch] in steps) == tokens - 1


def test_the_order_depends_on_the_seed(prepared: DataConfig) -> None:
    [[one]], [[two]] = take(make(prepared), 1), take(make(prepared, seed=8), 1)
    assert not torch.equal(one.input_ids, two.input_ids)


def test_budget(prepared: DataConfig) -> None:
    config = replace(prepared, sources={**prepared.sources})
    config.sources["numbers"] = replace(config.sources["numbers"], max_epochs=1.0)
    loader = make(config, micro=1, global_batch_size=1)
    available = loader.rows_available()
    assert available is not None
    loader.check_budget(available)
    with pytest.raises(DataError, match=r"data\.sources\.numbers\.max_epochs=1\.0"):
        loader.check_budget(available + 1)
    late = make(config, micro=1, global_batch_size=1, next_row=available - 1)
    next(late)
    for _ in range(2):  # again and again, not a hang
        with pytest.raises(DataError, match="max_epochs"):
            next(late)
    unlimited = make(prepared)
    assert unlimited.rows_available() is None
    unlimited.check_budget(10**15)


def test_an_error_in_the_background_is_raised(prepared: DataConfig, tmp_path: Path) -> None:
    config = replace(prepared, dir=str(shutil.copytree(prepared.dir, tmp_path / "copy")))
    loader = make(config)
    for path in Path(config.dir).rglob("train-*.tokens"):
        path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        next(loader)
    with pytest.raises(DataError, match="cannot be read"):
        next(loader)
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


@pytest.mark.timeout(30)
def test_close_never_hangs(prepared: DataConfig) -> None:
    untouched = make(prepared)
    untouched.close()
    for steps in (1, 4):
        loader = make(prepared)
        for _ in range(steps):
            next(loader)
        while not loader._queue.full():
            time.sleep(0.001)
        time.sleep(0.05)  # now the reader waits for room in the queue
        loader.close()
        loader.close()
        with pytest.raises(StopIteration):
            next(loader)
    finished = make(prepared, split="validation", source="numbers")
    assert list(finished)
    assert list(finished) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_another_configuration_or_none(prepared: DataConfig, data_config: DataConfig) -> None:
    with pytest.raises(DataError, match="not prepared; run python -m data_pipeline"):
        make(data_config)
    fewer = replace(prepared, sources={"letters": prepared.sources["letters"]}, validation_fraction=0.5)
    with pytest.raises(DataError) as error:
        make(fewer)
    assert "data.sources.numbers.kind: prepared with text, now nothing" in str(error.value)
    assert "data.validation_fraction: prepared with 0.1, now 0.5" in str(error.value)
    with pytest.raises(DataError, match=r"data\.sources letters, numbers: no whole row"):
        make(replace(prepared), seq_len=10**6, micro=1, global_batch_size=1)
