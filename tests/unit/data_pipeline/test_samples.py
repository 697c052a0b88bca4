"""The embedded corpus is real text, the same in every process."""

import subprocess
import sys

import pytest

from data_pipeline import samples
from data_pipeline.config import DataError


@pytest.mark.parametrize(
    ("collection", "least_bytes"), [("stdlib_code", 5_000_000), ("stdlib_prose", 1_000_000)]
)
def test_large_and_without_duplicates(collection: str, least_bytes: int) -> None:
    documents = samples.documents(collection)
    assert sum(map(len, documents)) > least_bytes
    assert len(set(documents)) == len(documents)
    assert all(document.strip() for document in documents)


def test_code_is_code_and_prose_is_prose() -> None:
    assert any("class JSONDecoder" in document for document in samples.documents("stdlib_code"))
    assert not any("import unittest.mock as mock\nfrom test" in d for d in samples.documents("stdlib_code"))
    prose = samples.documents("stdlib_prose")
    assert any(document.startswith("json") and "json.loads" in document for document in prose)
    assert any(document.startswith('The "assert" statement') for document in prose)


def test_order_does_not_depend_on_the_process() -> None:
    script = (
        "import hashlib; from data_pipeline import samples;"
        "both = [samples.documents(name) for name in ('stdlib_code', 'stdlib_prose')];"
        "print(hashlib.sha256(repr(both).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_unknown_collection() -> None:
    with pytest.raises(DataError, match="'stdlib_poems' is unknown; use stdlib_code, stdlib_prose"):
        samples.documents("stdlib_poems")
