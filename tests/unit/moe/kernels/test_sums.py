import pytest
import torch

from moe.kernels.sums import accumulate


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2049,), (0,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_those_of_torch_to_the_bit(device, shape, dtype):
    torch.manual_seed(0)
    first, second = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    flat = torch.full((first.numel() + 4,), 7.0, device=device)
    total = flat[3:-1].view(shape)  # a part of a flat buffer
    accumulate(total, first, first=True)
    assert torch.equal(total, first.float())
    accumulate(total, second, first=False)
    assert torch.equal(total, first.float() + second)
    assert (flat[:3] == 7).all()
    assert flat[-1] == 7


def test_a_transposed_gradient(device):
    total, gradient = torch.zeros(2, 3, device=device), torch.arange(6, device=device).view(3, 2).T.bfloat16()
    accumulate(total, gradient, first=False)
    assert torch.equal(total, gradient.float())
