"""A small corpus of two sources, prepared once."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig, SourceConfig, WeightsConfig
from data_pipeline.prepare import prepare

VOCAB_SIZE = 512
SEED = 7


def _write_corpus(folder: Path) -> None:
    """letters.jsonl: 240 documents; numbers/*.txt: 60 documents. Lengths vary widely; the seed is fixed."""
    chance = random.Random(0)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(1, 9))) for _ in range(300)]
    with open(folder / "letters.jsonl", "w") as file:
        for number in range(240):
            text = f"{number} " + " ".join(chance.choices(words, k=chance.randint(1, 120)))
            file.write(json.dumps({"text": text, "id": number}) + "\n")
    (folder / "numbers").mkdir()
    for number in range(60):
        text = "\n".join(str(chance.randint(0, 10**6)) for _ in range(chance.randint(1, 60)))
        (folder / "numbers" / f"{number:03d}.txt").write_text(text)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the raw text."""
    folder = tmp_path_factory.mktemp("corpus")
    _write_corpus(folder)
    return folder


@pytest.fixture
def data_config(corpus: Path, tmp_path: Path) -> DataConfig:
    """A configuration of the corpus, not yet prepared, with many small slices and shards."""
    return DataConfig(
        mode="prepared",
        dir=str(tmp_path / "prepared"),
        tokenizer=None,
        tokenizer_vocab_size=VOCAB_SIZE,
        sources={
            "letters": SourceConfig("jsonl", [str(corpus / "letters.jsonl")], "text", 3.0, None),
            "numbers": SourceConfig("text", [str(corpus / "numbers" / "*.txt")], None, 1.0, None),
        },
        validation_fraction=0.1,
        deduplicate="exact",
        exclude=[],
        min_characters=1,
        chat_template="qwen3",
        max_chat_tokens=None,
        think_flag_share=None,
        on_bad_row="skip",
        max_bad_fraction=1.0,
        slice_bytes=10_000,
        shard_bytes=8_000,
        num_workers=1,
        packing="concat",
        length_shares={},
        predict_first_token=False,
        fim_rates={},
        fim_spm_share=0.5,
        weights=WeightsConfig(alpha=0.0),
        weight_changes={},
        skip=[],
    )


@pytest.fixture(scope="session")
def _prepared_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepared") / "data"


@pytest.fixture
def prepared(data_config: DataConfig, _prepared_folder: Path) -> DataConfig:
    """The same configuration, prepared. All tests share the folder, so they must not write to it."""
    config = replace(data_config, dir=str(_prepared_folder))
    prepare(config, VOCAB_SIZE, SEED)
    return config
