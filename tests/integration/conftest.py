"""A small prepared corpus, and small training runs on it."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import SMALL, prepare_corpus, python


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a prepared corpus of short sentences with two sources and 512 token ids."""
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def small(corpus: list[str]) -> list[str]:
    """The arguments of a small training run, to which more overrides may be added."""
    return ["trainer", *SMALL, *corpus]


@pytest.fixture
def train(small: list[str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`train("name=a", ...)`: a small training run in the test's own folder."""
    return lambda *overrides: python(*small, *overrides, cwd=tmp_path)
