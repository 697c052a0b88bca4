"""The first of several equal documents is kept, however many hashes are sorted at a time."""

from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.documents import find_duplicates, hash_document


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(files=st.lists(st.lists(st.integers(0, 12)), max_size=5), at_once=st.integers(1, 70))
def test_duplicates_over_files_and_rounds(tmp_path: Path, files: list[list[int]], at_once: int) -> None:
    paths = []
    for number, documents in enumerate(files):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(b"".join(hash_document(bytes([document])) for document in documents))
    seen: set[int] = set()
    wanted = []
    for number, document in enumerate(document for documents in files for document in documents):
        if document in seen:
            wanted.append(number)
        seen.add(document)
    assert find_duplicates(paths, at_once).tolist() == wanted


def test_all_128_bits_count(tmp_path: Path) -> None:
    hashes = np.array([[1, 2], [1, 3], [2, 2], [1, 3], [1, 2]], dtype="<u8")
    (tmp_path / "hashes").write_bytes(hashes.tobytes())
    assert find_duplicates([tmp_path / "hashes"]).tolist() == [3, 4]
