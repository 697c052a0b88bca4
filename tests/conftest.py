"""Fixtures for all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from trainer.settings.config import RunConfig


def _compose(config_name: str = "train", *overrides: str) -> DictConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return compose(config_name, overrides=list(overrides))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under pytest-xdist, the tests of a file share a process, and so do all that use the SLURM cluster."""
    cluster = Path(__file__).parent / "slurm"
    for item in items:
        item.add_marker(pytest.mark.xdist_group(str(cluster if cluster in item.path.parents else item.path)))


@pytest.fixture
def composed():
    """`composed("key=value", ...)`: the composed configuration of a training run named t."""
    return lambda *overrides: _compose("train", "name=t", *overrides)


@pytest.fixture
def run_config(composed):
    """`run_config("key=value", ...)`: the same, typed."""
    return lambda *overrides: RunConfig.load(composed(*overrides))


@pytest.fixture
def repository() -> Path:
    """The root of the source tree."""
    return Path(__file__).parents[1]
