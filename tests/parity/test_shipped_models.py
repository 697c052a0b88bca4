"""The size of every shipped model: against transformers on meta, published sizes, and our own formula."""

from pathlib import Path

import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir
from torch import nn

from moe.config import ModelConfig
from moe.model import CausalLM
from trainer.settings.typed import typed

FOLDER = Path(__file__).parents[2] / "conf"
NAMES = sorted(path.stem for path in (FOLDER / "model").glob("[!_]*.yaml"))

# billions of parameters and of active parameters: reports (arXiv 2412.15115, 2505.09388) and model cards
PUBLISHED = {
    "qwen2_5_0_5b": (0.494, 0.494),
    "qwen2_5_1_5b": (1.544, 1.544),
    "qwen2_5_3b": (3.086, 3.086),
    "qwen2_5_7b": (7.616, 7.616),
    "qwen2_5_14b": (14.770, 14.770),
    "qwen2_5_32b": (32.764, 32.764),
    "qwen2_5_72b": (72.706, 72.706),
    "qwen1_5_moe_a2_7b": (14.316, 2.689),
    "qwen2_57b_a14b": (57.409, 14.249),
    "qwen3_next_80b_a3b": (79.674, 3.875),
    "qwen3_0_6b": (0.596, 0.596),
    "qwen3_1_7b": (1.721, 1.721),
    "qwen3_4b": (4.022, 4.022),
    "qwen3_8b": (8.191, 8.191),
    "qwen3_14b": (14.768, 14.768),
    "qwen3_32b": (32.762, 32.762),
    "qwen3_30b_a3b": (30.532, 3.353),
    "qwen3_235b_a22b": (235.094, 22.191),
}

TINY = {"tiny_dense", "tiny_moe", "tiny_qwen2", "tiny_qwen2_moe", "tiny_qwen3_next"}


def _load(name: str) -> ModelConfig:
    with initialize_config_dir(str(FOLDER), version_base=None):
        composed = compose(overrides=[f"+model={name}"]).model
    return typed(ModelConfig, composed)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_models_of_the_report_are_shipped() -> None:
    assert set(NAMES) == {*PUBLISHED, *TINY}


@pytest.mark.parametrize("name", NAMES)
def test_parameters(name: str) -> None:
    config = _load(name)
    assert config.problems() == []
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config.to_hf())
        )
        ours = CausalLM(config)
    assert _count(ours) == _count(theirs) == config.num_parameters()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    config = _load(name)
    sizes = config.num_parameters() / 1e9, config.num_active_parameters() / 1e9
    assert sizes == pytest.approx(PUBLISHED[name], abs=5e-4)


def test_30b_a3b_to_the_digit() -> None:
    with torch.device("meta"):
        assert _count(CausalLM(_load("qwen3_30b_a3b"))) == 30_532_122_624


@pytest.mark.parametrize(("name", "gigaflops"), [("qwen3_30b_a3b", 23.08), ("qwen3_235b_a22b", 148.3)])
def test_flops_per_token(name: str, gigaflops: float) -> None:
    assert _load(name).flops_per_token(4096) / 1e9 == pytest.approx(gigaflops, rel=5e-4)


@pytest.mark.parametrize("name", sorted(TINY))
def test_tiny_models_are_tiny(name: str) -> None:
    assert _load(name).num_parameters() < 15e6
