"""One cluster for the session, and what tests need to submit to it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import SMALL, Cluster, why_not
from commands import prepare_corpus


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of NODES nodes with a small prepared corpus."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    cluster = Cluster.start(prepare_corpus(tmp_path_factory.mktemp("corpus")))
    yield cluster
    cluster.down()


@pytest.fixture
def submit_command(cluster: Cluster) -> list[str]:
    """The arguments of a small submission, to which more overrides may be added."""
    return ["slurm", *SMALL, *cluster.data]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder from which a test submits."""
    return tmp_path
