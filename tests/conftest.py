"""Fixtures for all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from omegaconf import DictConfig

from trainer.settings.config import RunConfig


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`@pytest.mark.fuzzing(few, many)`: the fixture `fuzz` with few examples, and as a slow test many."""
    if marker := metafunc.definition.get_closest_marker("fuzzing"):
        few, many = marker.args
        of_many = pytest.param(many, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])
        metafunc.parametrize("fuzz", [few, of_many], indirect=True, ids=str)


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Callable[..., Callable[[Callable[..., None]], None]]:
    """`@fuzz(strategy, ...)` above a function in a test calls it with examples.

    They are the same as long as the sources are: Hypothesis takes constants from these.
    """
    rules = settings(
        max_examples=request.param,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
        phases=[Phase.generate],  # a failure is told as it is: to make it smaller may take minutes
    )

    def run(*strategies: SearchStrategy) -> Callable[[Callable[..., None]], None]:
        return lambda holds: rules(given(*strategies)(holds))()

    return run


def _compose(config_name: str = "train", *overrides: str) -> DictConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return compose(config_name, overrides=list(overrides))


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
