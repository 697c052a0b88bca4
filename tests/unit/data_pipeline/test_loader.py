"""The same global batches for any number of ranks, resumed at any step; reading ahead never hangs."""

import itertools
import json
import random
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline import chat
from data_pipeline.config import BLOCK_ROWS, DataConfig, DataError, SourceConfig, WeightsConfig
from data_pipeline.loader import Batch, Loader
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import prepare
from data_pipeline.shards import TokenStream
from data_pipeline.tokenizer import load_tokenizer

SEQ_LEN, GLOBAL_BATCH, SEED, VOCAB_SIZE = 32, 24, 7, 512
CHAT_SEQ_LEN = 96


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON Lines of 150 conversations of one to three answers, half of these with reasoning."""
    chance = random.Random(1)
    path = tmp_path_factory.mktemp("conversations") / "chat.jsonl"
    with open(path, "w") as file:
        for number in range(150):
            messages = []
            for _ in range(chance.randint(1, 3)):
                question, answer = (" ".join(chance.choices("etaoin", k=chance.randint(1, 15))) for _ in "qa")
                messages.append({"role": "user", "content": f"{number} {question}"})
                messages.append({"role": "assistant", "content": answer})
                if chance.random() < 0.5:
                    messages[-1]["reasoning_content"] = " ".join(chance.choices("shrdlu", k=9))
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture(scope="module")
def _mixed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixed") / "data"


@pytest.fixture
def mixed(data_config: DataConfig, conversations: Path, _mixed_folder: Path) -> DataConfig:
    """One configuration with every option that changes the order of rows."""
    config = replace(
        data_config,
        dir=str(_mixed_folder),
        sources={
            **data_config.sources,
            "chat": SourceConfig("sft", [str(conversations)], None, 0.0, None),
        },
        packing="best_fit",
        fim_rates={"letters": 0.5},
        weight_changes={40 * SEQ_LEN: {"chat": 4.0}, 130 * SEQ_LEN: {"numbers": 0.0, "letters": 1.0}},
        skip=[[5, 9], [31, 32], [100, 148]],
    )
    prepare(config, VOCAB_SIZE, SEED)
    return config


@pytest.fixture(params=["concat", "everything"])
def ordered(request: pytest.FixtureRequest) -> DataConfig:
    """The plain configuration, and the one with every option that changes the order of rows."""
    return request.getfixturevalue("prepared" if request.param == "concat" else "mixed")


def make(
    config: DataConfig, rank: int = 0, world_size: int = 1, micro: int = GLOBAL_BATCH, **changes: object
) -> Loader:
    options = {"seq_len": SEQ_LEN, "global_batch_size": GLOBAL_BATCH, "seed": SEED, **changes}
    return Loader(config, micro_batch_size=micro, rank=rank, world_size=world_size, **options)


def take(loader: Loader, steps: int) -> list[list[Batch]]:
    with loader:
        return [next(loader) for _ in range(steps)]


def by_row(batches: list[Batch]) -> dict[int, tuple]:
    """Global row -> the contents of the row; its borders are counted from its start."""
    rows = {}
    for batch in batches:
        borders = batch.cu_seqlens.tolist()
        seq_len = batch.input_ids.shape[1]
        assert (batch.tokens, batch.label_tokens) == (batch.token_mask.sum(), (batch.labels != -100).sum())
        for slot, row in enumerate(batch.rows):
            start, stop = slot * seq_len, (slot + 1) * seq_len
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
    borders = batch.cu_seqlens.tolist()
    assert batch.lengths == tuple(stop - start for start, stop in itertools.pairwise(borders))
    assert batch.label_tokens == (batch.labels != -100).sum()
    assert batch.tokens == batch.token_mask.sum()
    moved = batch.to("meta")
    assert (moved.lengths, moved.label_tokens, moved.tokens) == (
        batch.lengths,
        batch.label_tokens,
        batch.tokens,
    )
    assert moved.rows == batch.rows
    assert all(value.is_meta for value in vars(moved).values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(
    ("world_size", "micro"), [(1, 1), (1, 4), (2, 1), (2, 12), (3, 2), (3, 4), (4, 3), (8, 1), (8, 3)]
)
def test_global_batches_do_not_depend_on_the_ranks(ordered: DataConfig, world_size: int, micro: int) -> None:
    steps = 8
    expected = [by_row(batches) for batches in take(make(ordered), steps)]
    ranks = [take(make(ordered, rank, world_size, micro), steps) for rank in range(world_size)]
    skipped = {row for first, end in ordered.skip for row in range(first, end)}
    numbers = [row for row in range(1000) if row not in skipped]
    for step in range(steps):
        micro_batches = [batch for rank in ranks for batch in rank[step]]
        assert by_row(micro_batches) == expected[step]
        for r, rank in enumerate(ranks):  # existing checkpoints rely on this formula
            for m, batch in enumerate(rank[step]):
                first = step * GLOBAL_BATCH + m * world_size * micro + r * micro
                assert batch.rows == tuple(numbers[first : first + micro])


@pytest.mark.parametrize("stop", [0, 1, 3, 7])
@pytest.mark.parametrize("world_size", [3, 8])
def test_resume_is_one_integer_at_any_world_size(ordered: DataConfig, stop: int, world_size: int) -> None:
    whole = [by_row(batches) for batches in take(make(ordered), 9)]
    before = make(ordered, 0, 2, 3)
    take(before, stop)
    assert before.next_row == stop * GLOBAL_BATCH
    later = {"next_row": before.next_row}
    ranks = [take(make(ordered, rank, world_size, 1, **later), 9 - stop) for rank in range(world_size)]
    after = [by_row([batch for rank in ranks for batch in rank[step]]) for step in range(9 - stop)]
    assert after == whole[stop:]


def test_skipped_rows_are_left_out_and_the_others_stay(mixed: DataConfig) -> None:
    whole = by_row([batch for step in take(make(replace(mixed, skip=[])), 8) for batch in step])
    some = by_row([batch for step in take(make(mixed), 5) for batch in step])
    assert len(some) == 5 * GLOBAL_BATCH
    assert max(some) == 5 * GLOBAL_BATCH - 1 + 4 + 1 + 48
    assert all(some[row] == whole[row] for row in some)


def test_weights_change_with_the_tokens(mixed: DataConfig) -> None:
    """Rows of chat are recognised by their control tokens."""
    im_start = load_tokenizer(mixed.dir).control_id("<|im_start|>")
    rows = by_row([batch for step in take(make(replace(mixed, skip=[])), 8) for batch in step])
    with_chat = [row for row, (input_ids, *_) in rows.items() if im_start in input_ids]
    assert min(with_chat) >= 40
    assert len([row for row in with_chat if row < 130]) > 30
    without = take(make(replace(mixed, skip=[], weight_changes={})), 8)
    same = by_row([batch for step in without for batch in step])
    assert all(same[row] == rows[row] for row in range(40))


def test_weights_change_at_the_first_row_that_begins_after_the_tokens(mixed: DataConfig) -> None:
    at_row = replace(mixed, skip=[], weight_changes={40 * SEQ_LEN: {"chat": 4.0}})
    inside = replace(at_row, weight_changes={40 * SEQ_LEN - 5: {"chat": 4.0}})
    one, two = (by_row([b for step in take(make(config), 4) for b in step]) for config in (at_row, inside))
    assert one == two


def test_tokens_seen_are_those_of_the_order_up_to_the_last_row(mixed: DataConfig) -> None:
    skipping = make(mixed)
    last = max(take(skipping, 5)[-1][0].rows)
    assert last > 5 * GLOBAL_BATCH
    with make(replace(mixed, skip=[]), next_row=last + 1) as whole:
        assert skipping.seen() == whole.seen()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_length_shares_do_not_apply_to_one_source(mixed: DataConfig, split: str) -> None:
    plain = replace(mixed, weight_changes={}, fim_rates={})
    shared = replace(plain, length_shares={1: 0.5, 20: 0.5})
    rows = [
        by_row([batch for step in make(config, split=split, source="letters") for batch in step])
        for config in (plain, shared)
    ]
    assert rows[0] == rows[1]


def test_conversations_are_whole_and_only_answers_have_labels(mixed: DataConfig, conversations: Path) -> None:
    only = {name: replace(s, weight=float(name == "chat")) for name, s in mixed.sources.items()}
    config = replace(mixed, sources=only, weight_changes={}, skip=[])
    tokenizer = load_tokenizer(config.dir)
    expected: dict[tuple, int] = {}
    for line in conversations.read_text().splitlines():
        for pieces in chat.samples(json.loads(line), None):
            ids, learned = chat.encode(pieces, tokenizer)
            if len(ids) <= CHAT_SEQ_LEN:  # with the closing id it fits into a row of CHAT_SEQ_LEN + 1
                labels = [*(i if bit else -100 for i, bit in zip(ids[1:], learned[1:], strict=True)), -100]
                expected[*ids, *labels] = 0
    loader = make(config, micro=1, global_batch_size=1, seq_len=CHAT_SEQ_LEN)
    with loader:
        [line] = loader.describe()
        for _ in range(len(loader._rows["chat"])):
            [batch] = next(loader)
            ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
            borders = batch.cu_seqlens.tolist()
            for start, stop in itertools.pairwise(borders):
                if not batch.token_mask[0, start]:
                    assert labels[start:stop] == [-100] * (stop - start)
                    continue
                document, targets = ids[start:stop], labels[start:stop]
                if document[-1] == loader.manifest.tokenizer.end_of_text:
                    assert targets.pop() == -100, "the closing id must have no target"
                    document.pop()
                expected[*document, *targets] += 1
    assert "longer than a row" in line
    validation = len(expected) - sum(expected.values())
    assert set(expected.values()) == {0, 1}
    assert 0 < validation < 0.25 * len(expected), "some are held out"


def test_fill_in_the_middle_changes_documents_and_not_their_order(prepared: DataConfig) -> None:
    tokenizer = load_tokenizer(prepared.dir)
    prefix = tokenizer.control_id("<|fim_prefix|>")
    for packing in ("concat", "best_fit"):
        plain = replace(prepared, packing=packing)
        changed = replace(plain, fim_rates={"letters": 1.0})
        before, after = (
            by_row([b for step in take(make(config), 6) for b in step]) for config in (plain, changed)
        )
        whole = 0
        for row, (input_ids, labels, positions, mask, borders) in after.items():
            assert (positions, mask, borders) == before[row][2:]
            if input_ids == before[row][0]:
                assert prefix not in input_ids, "only a row of the other source may stay the same"
                continue
            for start, stop in itertools.pairwise(borders):
                if stop - start >= 8 and all(mask[start:stop]):
                    assert input_ids[start] == prefix
                    assert labels[start] == input_ids[start + 1]
                    whole += 1
        assert whole > 50
        validation = make(changed, split="validation", source="letters")
        assert not any(prefix in b.input_ids for step in validation for b in step), "held-out text is kept"


def test_rows_are_the_tokens_of_their_sources(prepared: DataConfig) -> None:
    """One epoch of one source holds every span of its training tokens once."""
    only = {name: replace(s, weight=float(name == "letters")) for name, s in prepared.sources.items()}
    config = replace(prepared, sources=only)
    record = Manifest.load(Path(config.dir)).sources["letters"].shards["train"]
    stream = TokenStream(Path(config.dir), record)
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
    skipping = replace(prepared, skip=[[0, 3]])  # of training rows
    for source, record in Manifest.load(Path(prepared.dir)).sources.items():
        stream = TokenStream(Path(prepared.dir), record.shards["validation"])
        tokens = stream.read(0, len(stream)).tolist()
        stream.close()
        ranks = [
            list(make(skipping, rank, world_size, micro, split="validation", source=source))
            for rank in range(world_size)
        ]
        assert (
            len({tuple(len(step) for step in rank) for rank in ranks}) == 1
        )  # otherwise the ranks would wait for each other forever
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
        tokens = sum(shard.tokens for shard in record.shards["validation"])
        for seq_len in (tokens - 2, tokens - 1, tokens, 32):
            loader = make(
                prepared, seq_len=seq_len, micro=1, global_batch_size=1, split="validation", source=source
            )
            steps = list(loader)
            assert len(steps) == -(-(tokens - 1) // seq_len)
            assert sum(int(batch.token_mask.sum()) for [batch] in steps) == tokens - 1


def test_the_order_depends_on_the_seed(prepared: DataConfig) -> None:
    [[one]], [[two]] = take(make(prepared), 1), take(make(prepared, seed=8), 1)
    assert not torch.equal(one.input_ids, two.input_ids)


def over_budget(loader: Loader, rows: int) -> bool:
    try:
        loader.check_budget(rows)
    except DataError:
        return True
    return False


def test_budget(prepared: DataConfig) -> None:
    config = replace(prepared, sources={**prepared.sources})
    config.sources["numbers"] = replace(config.sources["numbers"], max_epochs=1.0)
    loader = make(config, micro=1, global_batch_size=1)
    available = next(rows for rows in itertools.count() if over_budget(loader, rows + 1))
    loader.check_budget(available)
    with pytest.raises(DataError, match=r"data\.sources\.numbers\.max_epochs=1\.0"):
        loader.check_budget(available + 1)
    late = make(config, micro=1, global_batch_size=1, next_row=available - 1)
    next(late)
    for _ in range(2):  # each call must raise, not hang
        with pytest.raises(DataError, match="max_epochs"):
            next(late)
    make(prepared).check_budget(10**15)


def test_an_error_in_the_background_is_raised(prepared: DataConfig, tmp_path: Path) -> None:
    config = replace(prepared, dir=str(shutil.copytree(prepared.dir, tmp_path / "copy")))
    loader = make(config)
    for path in Path(config.dir).rglob("train-*.tokens"):
        path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        next(loader)
    with pytest.raises(DataError, match="cannot be read"):
        next(loader)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.timeout(30)
def test_close_never_hangs(prepared: DataConfig) -> None:
    untouched = make(prepared)
    untouched.close()
    for steps in (1, 4):
        loader = make(prepared)
        for _ in range(steps):
            next(loader)
        assert len(loader._ahead) == 2
        while not all(step.done() for step in loader._ahead):
            time.sleep(0.001)
        loader.close()
        loader.close()
        with pytest.raises(StopIteration):
            next(loader)
    finished = make(prepared, split="validation", source="numbers")
    assert list(finished)
    assert list(finished) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


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


def test_sizes_of_sources_count_with_alpha(mixed: DataConfig) -> None:
    """With alpha = 1 and equal weights, every source is read equally often."""
    sources = {name: replace(of, weight=1.0, max_epochs=None) for name, of in mixed.sources.items()}
    even = replace(mixed, skip=[], weight_changes={}, sources=sources, weights=WeightsConfig(alpha=1.0))
    with make(even, next_row=50 * BLOCK_ROWS) as loader:
        epochs = {name: of["epochs"] for name, of in loader.seen().items()}
    assert len(epochs) > 1
    assert max(epochs.values()) == pytest.approx(min(epochs.values()), rel=0.01)
