"""Copies for a checkpoint, made through a small buffer."""

import pytest
import torch

from trainer.checkpoints.saving import staged


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
