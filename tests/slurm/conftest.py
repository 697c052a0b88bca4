"""One cluster for the session, and the scenarios that run on it side by side."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import SMALL, Cluster, why_not
from commands import python


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of ten nodes, and a small prepared corpus."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("corpus")
    sentences = [f"The number {n} follows {n - 1}, and {n * n} is its square.\n" * 3 for n in range(300)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in sentences))
    data = [
        "data=jsonl",
        f"data.dir={folder}/prepared",
        "data.tokenizer_vocab_size=512",
        f"data.sources.text.paths=[{folder}/text.jsonl]",
    ]
    of_run = [override for override in SMALL if not override.startswith("slurm.")]
    prepared = python("data_pipeline", "name=t", *of_run, *data, cwd=folder)
    assert prepared.returncode == 0, prepared.stderr
    cluster = Cluster.start(data)
    yield cluster
    cluster.down()


@pytest.fixture
def submit_command(cluster: Cluster) -> list[str]:
    """The arguments of a small submission, to which more overrides may be added."""
    return ["slurm", *SMALL, *cluster.data]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a test submits from."""
    return tmp_path
