"""A small prepared corpus, and small training runs on it."""

import shutil
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


@pytest.fixture(scope="session")
def _finished(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    done = python("trainer", *SMALL, *corpus, "name=a", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs/a"


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    """`runs/a` in the test's own folder, as `train("name=a")` leaves it."""
    return Path(shutil.copytree(_finished, tmp_path / "runs/a"))
