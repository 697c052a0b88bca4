"""Lessons on disk: rows are found again; those that are absent, damaged or of other tokens are refused."""

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.config import DataError
from data_pipeline.loader import Batch
from moe.config import ConfigError, ModelConfig
from moe.hf import save_hf
from moe.init import init_weights
from moe.model import CausalLM
from trainer.ranks.runtime import Ranks
from trainer.settings.config import RunConfig
from trainer.stages.lessons import Lessons, Teacher, begin_folder, checksums

SEQ_LEN, K, ROWS, PER_FILE = 8, 3, 10, 4


def rows(first: int, count: int) -> Batch:
    """A batch of rows of the data order: row g holds tokens that follow from g, in two documents."""
    numbers = tuple(range(first, first + count))
    ids = torch.arange(SEQ_LEN).expand(count, -1) + torch.tensor(numbers)[:, None]
    positions = torch.cat([torch.arange(3), torch.arange(SEQ_LEN - 3)]).expand(count, -1)
    borders = torch.tensor([0, *(SEQ_LEN * n + at for n in range(count) for at in (3, SEQ_LEN))])
    mask = torch.ones(count, SEQ_LEN, dtype=torch.bool)
    return Batch.of(ids, ids, positions.contiguous(), borders.int(), mask, numbers)


def said(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What a teacher might say: numbers that tell the row and the position."""
    tokens = torch.tensor(batch.rows).repeat_interleave(SEQ_LEN) * 100 + torch.arange(SEQ_LEN).repeat(
        len(batch.rows)
    )
    return tokens[:, None].int().expand(-1, K), -tokens[:, None].float().expand(-1, K + 1)


@pytest.fixture
def config(run_config, tmp_path: Path) -> RunConfig:
    """A run with lessons in a folder that is not there yet, of a teacher that nobody reads."""
    keys = ["distill=teacher", "distill.teacher=/t", f"distill.top_k={K}", f"distill.lessons={tmp_path}/said"]
    return run_config(*keys, f"stage.seq_len={SEQ_LEN}")


@pytest.fixture
def lessons(config: RunConfig, tmp_path: Path) -> Lessons:
    """All lessons of ten rows, in files of four."""
    begin_folder(config)
    record = json.loads((tmp_path / "said/teacher.json").read_text())
    (tmp_path / "said/teacher.json").write_text(json.dumps(record | {"rows_per_file": PER_FILE}))
    found = Lessons(config)
    assert found.absent(ROWS) == [0, 4, 8]
    for first in (0, 4, 8):
        batches = [rows(first, 3), rows(first + 3, 3)]  # more than the file holds
        found.write(first, ROWS, [(batch, *said(batch)) for batch in batches])
    assert found.absent(ROWS) == []
    return Lessons(config)


def test_every_row_is_found_in_any_batch(lessons: Lessons) -> None:
    for first, count in [(0, 1), (3, 2), (0, 10), (9, 1)]:
        batch = rows(first, count)
        assert all(torch.equal(one, other) for one, other in zip(lessons(batch), said(batch), strict=True))


def test_a_longer_run_adds_rows(lessons: Lessons) -> None:
    with pytest.raises(
        DataError, match=r"rows-000000000008.safetensors with row 10 is absent; make it again"
    ):
        lessons(rows(9, 2))
    assert lessons.absent(11) == [8]
    assert lessons.absent(13) == [8, 12]


def test_other_tokens_and_other_documents_are_refused(lessons: Lessons) -> None:
    batch = rows(5, 2)
    for tensor in (batch.input_ids, batch.position_ids):
        before = int(tensor[1, 4])
        tensor[1, 4] = 77
        with pytest.raises(DataError, match="row 6 is not that of this run: its data, its order or its seed"):
            lessons(batch)
        tensor[1, 4] = before
    lessons(batch)
    assert len(set(checksums(rows(0, 10)))) == 10


@pytest.mark.parametrize("place", [-1, -300, 400, 9])
def test_a_flipped_bit_is_noticed(lessons: Lessons, tmp_path: Path, place: int) -> None:
    path = tmp_path / "said/rows-000000000004.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"{path} (is damaged|cannot be read)"):
        lessons(rows(4, 1))
    lessons(rows(0, 1))


def test_a_torn_file_is_told(lessons: Lessons, tmp_path: Path) -> None:
    path = tmp_path / "said/rows-000000000004.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    for use in (lambda: lessons(rows(4, 1)), lambda: lessons.absent(ROWS)):
        with pytest.raises(DataError, match=f"{path} cannot be read"):
            use()


def test_a_folder_of_something_else_is_left_alone(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "said").mkdir()
    (tmp_path / "said/thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="holds something else; name a new folder"):
        begin_folder(config)
    assert [path.name for path in (tmp_path / "said").iterdir()] == ["thesis.txt"]


def test_files_are_of_bounded_size(run_config, tmp_path: Path) -> None:
    for seq_len, top_k, expected in [(8, 3, 64), (4096, 64, 31), (32768, 2048, 1)]:
        folder = tmp_path / f"{seq_len}"
        keys = [
            "distill=teacher",
            "distill.teacher=/t",
            f"distill.top_k={top_k}",
            f"distill.lessons={folder}",
        ]
        begin_folder(run_config(*keys, f"stage.seq_len={seq_len}"))
        assert json.loads((folder / "teacher.json").read_text())["rows_per_file"] == expected


def test_a_teacher_is_neither_upcycled_nor_trained(run_config, tmp_path: Path) -> None:
    shape = run_config("model=tiny_dense", "model.num_hidden_layers=1").model
    teacher = CausalLM(shape)
    init_weights(teacher, seed=3)
    save_hf(teacher, tmp_path)
    built: list[RunConfig] = []

    def build(config: RunConfig) -> CausalLM:
        built.append(config)
        return CausalLM(ModelConfig.of_folder(tmp_path))

    keys = [
        "distill=teacher",
        f"distill.teacher={tmp_path}",
        "init.upcycle=copy",
        "stage.init_from=/somewhere",
    ]
    run = run_config("model=tiny_moe", *keys)
    Teacher(run, Ranks(0, 0, 1, torch.device("cpu")), build)
    (one,) = built
    assert (one.init.upcycle, one.stage.init_from) == ("none", str(tmp_path))
    assert one.model == ModelConfig.of_folder(tmp_path) != run.model
    assert run.init.upcycle == "copy"
