"""Weights and data of different tokenizers are refused."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data_pipeline.config import DataConfig
from data_pipeline.tokenizer import train_tokenizer
from moe.config import ConfigError
from trainer.checkpoints.assemble import check_tokenizer

DATA = OmegaConf.load(Path(__file__).parents[4] / "conf" / "data" / "_common.yaml")


def tokenizer_in(folder: Path, vocab_size: int) -> Path:
    folder.mkdir()
    text = train_tokenizer(["some words that words are made of, some more than some"], vocab_size)
    (folder / "tokenizer.json").write_text(text)
    return folder


@pytest.mark.parametrize("mode", ["prepared", "streaming"])
def test_another_tokenizer_is_refused(tmp_path: Path, mode: str) -> None:
    weights = tokenizer_in(tmp_path / "weights", 280)
    same, other = tokenizer_in(tmp_path / "same", 280), tokenizer_in(tmp_path / "other", 281)

    def data(folder: Path) -> DataConfig:
        place = {"dir": str(folder), "tokenizer": None} if mode == "prepared" else {"tokenizer": str(folder)}
        return DataConfig(**{"dir": "nowhere", "sources": {}, **DATA, **place, "mode": mode})

    check_tokenizer(weights, data(same))
    with pytest.raises(ConfigError) as error:
        check_tokenizer(weights, data(other))
    assert f"stage.init_from: {weights} was trained with a different tokenizer from" in str(error.value)
    assert f"data.tokenizer={weights}" in str(error.value)
    (weights / "tokenizer.json").unlink()
    check_tokenizer(weights, data(other))  # without a tokenizer nothing is compared
