"""Copies for a checkpoint, made through a small buffer; the file of their numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer.checkpoints.optimizer_state import write_fragments
from trainer.checkpoints.saving import staged
from trainer.engine.engine import Fragment


@pytest.mark.parametrize("shape", [(), (0,), (7,), (16,), (3, 5, 7), (33,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_staged_copy_is_a_copy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape).to(dtype).requires_grad_()
    copy = staged(tensor, torch.empty(64, dtype=torch.uint8))  # 16 fp32 or 32 bf16 values
    assert copy.dtype == dtype
    assert torch.equal(copy, tensor.detach())
    assert not copy.requires_grad
    assert copy.is_contiguous()
    assert tensor.numel() == 0 or copy.data_ptr() != tensor.data_ptr()


def test_a_transposed_tensor_keeps_its_shape() -> None:
    tensor = torch.arange(24.0).view(4, 6).t()
    assert torch.equal(staged(tensor, torch.empty(20, dtype=torch.uint8)), tensor)


@pytest.mark.parametrize("name", ["w", "we", "wei", "weigh", "weight.s"])
def test_numbers_in_a_file_of_fragments_are_aligned(tmp_path: Path, name: str) -> None:
    """The data of a safetensors file begin at a multiple of 8 bytes, as its format wants it."""
    write_fragments(tmp_path / "file", [Fragment(name, 3, {"master": torch.arange(5.0)}, owned=True)])
    data = (tmp_path / "file").read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert header % 8 == 0
    assert load_file(tmp_path / "file")[f"{name}:3:master"].tolist() == [0, 1, 2, 3, 4]
