"""Streaming gives the rows of a prepared folder, on any number of ranks, and resumes where it stopped."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from data_pipeline.__main__ import show
from data_pipeline.config import DataConfig, DataError, SourceConfig
from data_pipeline.loader import Loader
from data_pipeline.manifest import Manifest
from data_pipeline.shards import TokenStream
from data_pipeline.streaming import TextStream
from data_pipeline.tokenizer import load_tokenizer

SEQ_LEN, SEED = 32, 7


@pytest.fixture
def streaming(prepared: DataConfig) -> DataConfig:
    """The corpus of `prepared` in streaming mode, with the same tokenizer."""
    return replace(
        prepared, mode="streaming", dir="nowhere", tokenizer=prepared.dir, tokenizer_vocab_size=None
    )


def rows_of(config: DataConfig, steps: int, rank: int = 0, world_size: int = 1, next_row: int = 0) -> dict:
    """Global row -> inputs and labels."""
    options = {"seq_len": SEQ_LEN, "global_batch_size": 12, "micro_batch_size": 2, "seed": SEED}
    found = {}
    with Loader(config, rank=rank, world_size=world_size, next_row=next_row, **options) as loader:
        for batch in (batch for _ in range(steps) for batch in next(loader)):
            for row, ids, labels in zip(batch.rows, batch.input_ids, batch.labels, strict=True):
                found[row] = (ids.tolist(), labels.tolist())
    return found


@pytest.mark.parametrize("source", ["letters", "numbers"])
def test_an_epoch_is_the_tokens_of_a_prepared_folder(
    streaming: DataConfig, prepared: DataConfig, source: str
) -> None:
    shards = Manifest.load(Path(prepared.dir)).sources[source].shards["train"]
    stream = TokenStream(Path(prepared.dir), shards)
    wanted = stream.read(0, len(stream))
    for slice_bytes in (500, 10**9):
        config = replace(streaming, slice_bytes=slice_bytes)
        text = TextStream(config, source, load_tokenizer(prepared.dir), SEED)
        assert np.array_equal(text.read(0, 2 * len(wanted)), np.tile(wanted, 2)), "epochs repeat"
        later, far = TextStream(config, source, load_tokenizer(prepared.dir), SEED), len(wanted) + 90
        assert np.array_equal(later.read(far, far + 50), wanted[90:140]), "earlier tokens are skipped"
        assert np.array_equal(later.read(5, 77), wanted[5:77]), "reading backwards"
        text.close()


def test_rows_do_not_depend_on_the_ranks_and_a_resume_goes_on(streaming: DataConfig) -> None:
    config = replace(
        streaming, fim_rates={"letters": 0.5}, weight_changes={30 * SEQ_LEN: {"numbers": 9.0}}, skip=[[4, 9]]
    )
    whole = rows_of(config, 6)
    assert len(whole) == 72
    assert not whole.keys() & set(range(4, 9))
    ranks = [rows_of(config, 6, rank, 3) for rank in range(3)]
    assert ranks[0] | ranks[1] | ranks[2] == whole
    later = rows_of(config, 2, 0, 2, next_row=48) | rows_of(config, 2, 1, 2, next_row=48)
    assert len(later) == 24
    assert later.items() <= whole.items()
    assert rows_of(replace(config, weight_changes={}, fim_rates={}), 6) != whole


def test_conversations_keep_what_is_learned(streaming: DataConfig, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 3)
    source = SourceConfig("sft", [str(tmp_path / "chat.jsonl")], None, 1.0, None)
    config = replace(streaming, sources={"chat": source}, validation_fraction=0.0, deduplicate="none")
    tokenizer = load_tokenizer(str(streaming.tokenizer))
    text = TextStream(config, "chat", tokenizer, SEED)
    tokens = text.read(0, 300)
    end = int(np.flatnonzero(tokens == tokenizer.end_of_text)[0])
    learned = tokens[: end + 1][text.read_loss(0, 300)[: end + 1]]
    assert tokenizer.decode(learned.tolist()) == "<think>\n\n</think>\n\n4<|im_end|>"
    once = replace(config, deduplicate="exact", sources={"chat": replace(source, max_epochs=2.0)})
    with pytest.raises(
        DataError, match=rf"data\.sources\.chat: epoch 2 is over after {2 * (end + 1)} tokens"
    ):
        TextStream(once, "chat", tokenizer, SEED).read(0, 2 * (end + 1) + 1)


def test_texts_of_benchmarks_are_not_bad_rows(streaming: DataConfig, tmp_path: Path) -> None:
    """As in a preparation: they are left out, and neither stop a run nor count as bad."""
    question = " ".join(f"word{n}" for n in range(13))
    (tmp_path / "test.txt").write_text(question)
    rows = [{"text": question}] * 60 + [{"text": "else"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"exclude": [f"{tmp_path}/test.txt"], "on_bad_row": "error", "max_bad_fraction": 0.0}
    source = SourceConfig("jsonl", [f"{tmp_path}/a.jsonl"], "text", 1.0, None)
    config = replace(streaming, sources={"s": source}, **given)
    tokenizer = load_tokenizer(str(streaming.tokenizer))
    ids = TextStream(config, "s", tokenizer, SEED).read(0, 40)
    assert set(tokenizer.decode(ids.tolist()).split("<|endoftext|>")[:-1]) == {"else"}


def test_bad_rows(streaming: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(100)) + "\nbad\n" * 100)
    source = SourceConfig("jsonl", [str(path)], "text", 1.0, None)
    config = replace(streaming, sources={"s": source}, max_bad_fraction=0.2)
    tokenizer = load_tokenizer(str(streaming.tokenizer))
    assert len(TextStream(config, "s", tokenizer, SEED).read(0, 10_000)) == 10_000
    with pytest.raises(
        DataError, match=r"51 of the first 202 rows are bad, more than.*=0\.05; the last: json"
    ):
        TextStream(replace(config, max_bad_fraction=0.05), "s", tokenizer, SEED).read(0, 10_000)
    with pytest.raises(DataError, match=r"a\.jsonl: the row at \d+ is bad \(json"):
        TextStream(replace(config, on_bad_row="error"), "s", tokenizer, SEED).read(0, 10_000)
    with pytest.raises(DataError, match=r"data\.sources\.s: its first rows have no 'body' of type str"):
        TextStream(replace(config, sources={"s": replace(source, text_key="body")}), "s", tokenizer, SEED)


def test_hub_datasets_are_read_as_they_come(streaming: DataConfig, tmp_path: Path) -> None:
    """A folder takes the place of a hub dataset: `datasets` streams both in the same way."""
    Dataset.from_dict({"text": ["one", "two", "three"]}).to_parquet(tmp_path / "train.parquet")
    source = SourceConfig("hub", [f"{tmp_path}:train"], "text", 1.0, None)
    config = replace(streaming, sources={"s": source}, validation_fraction=0.0)
    tokenizer = load_tokenizer(str(streaming.tokenizer))
    text = tokenizer.decode(TextStream(config, "s", tokenizer, SEED).read(0, 20).tolist())
    assert text.startswith("one<|endoftext|>two<|endoftext|>three<|endoftext|>one")


def test_what_streaming_cannot_do_is_said_at_once(streaming: DataConfig) -> None:
    sources = {**streaming.sources, "letters": replace(streaming.sources["letters"], max_epochs=1.5)}
    sources["asked"] = SourceConfig("prompts", ["a.jsonl"], weight=0.0)
    broken = replace(streaming, packing="best_fit", on_bad_row="quarantine", sources=sources)
    keys = ["data.packing=best_fit", "data.on_bad_row=quarantine", "data.sources.letters.max_epochs=1.5"]
    keys += ["data.sources.asked.kind=prompts"]
    problems = broken.problems()
    assert [problem.split(": ")[1].split(" ")[0] for problem in problems] == keys
    assert all(problem.endswith("or prepare the data and use data.mode=prepared") for problem in problems)
    [problem] = replace(streaming, tokenizer=None, tokenizer_vocab_size=512).problems()
    assert "data.tokenizer=null" in problem
    with pytest.raises(DataError, match="only rows of a prepared folder"):
        show(streaming, "0", seq_len=SEQ_LEN, seed=SEED)
