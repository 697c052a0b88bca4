"""A small prepared corpus and runs on it."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import SMALL, python


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a prepared corpus of two sources, 512 ids, made of short sentences."""
    folder = tmp_path_factory.mktemp("corpus")
    for source in ("text", "second"):
        lines = [
            f"The {source} number {n} follows {n - 1}, and {n * n} is its square.\n" * 3 for n in range(400)
        ]
        (folder / f"{source}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    overrides = [
        "data=jsonl",
        f"data.dir={folder}/prepared",
        "data.tokenizer_vocab_size=512",
        "data.validation_fraction=0.1",
        f"data.sources.text.paths=[{folder}/text.jsonl]",
        f"+data.sources.second={{kind:jsonl,paths:[{folder}/second.jsonl],text_key:text,weight:0.5,max_epochs:null}}",
    ]
    prepared = python("data_pipeline", "name=t", "model.vocab_size=512", *overrides, cwd=folder)
    assert prepared.returncode == 0, prepared.stderr
    return overrides


@pytest.fixture
def small(corpus: list[str]) -> list[str]:
    """The arguments of a small training run, to which more overrides may be added."""
    return ["trainer", *SMALL, *corpus]


@pytest.fixture
def train(small: list[str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`train("name=a", ...)`: a small training run in a folder of the test's own."""
    return lambda *overrides: python(*small, *overrides, cwd=tmp_path)
