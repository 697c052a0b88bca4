import pytest
import torch

from moe.experts import _activate, _activate_backward
from moe.grouping import Grouping
from moe.kernels import experts


def inputs(rows, width, dtype, device):
    torch.manual_seed(rows * 1000 + width)
    gate_up = torch.randn(rows, 2 * width, dtype=dtype, device=device)
    grad = torch.randn(rows, width, dtype=dtype, device=device)
    weights = torch.rand(rows + 3, 5, dtype=dtype, device=device)[:, 1:3]  # columns of a packed buffer
    slot = torch.randperm(2 * (rows + 3), device=device)[:rows]
    return gate_up, weights, slot, grad


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (4, 16), (5, 7), (9, 24), (0, 8)])
def test_activation_and_its_gradient(device, rows, width):
    gate_up, weights, slot, grad = inputs(rows, width, torch.float32, device)
    torch.testing.assert_close(
        experts.activate(gate_up, weights, slot), _activate(gate_up, weights, slot), rtol=1e-5, atol=1e-6
    )
    found = experts.activate_backward(gate_up, weights, slot, grad.clone())
    expected = _activate_backward(gate_up, weights, slot, grad.clone())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert (found[1].flatten() == 0).sum() >= weights.numel() - rows  # slots without a row


# Triton's interpreter truncates to bf16, where a GPU rounds: one spacing
@pytest.mark.parametrize(("dtype", "spacing"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_sixteen_bits_are_rounded_once(device, dtype, spacing):
    gate_up, weights, slot, grad = inputs(5, 24, dtype, device)
    wide = (gate_up.float(), weights.float(), slot)
    found = [experts.activate(gate_up, weights, slot)]
    found += experts.activate_backward(gate_up, weights, slot, grad.clone())
    expected = [_activate(*wide), *_activate_backward(*wide, grad.float())]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), other, rtol=spacing, atol=1e-6)


@pytest.mark.parametrize(
    "groups",
    [
        torch.tensor([[0, 1], [2, 2], [1, 0]]),
        torch.tensor([[3, 3], [0, 3], [3, 3]]),  # 3 is nowhere: tokens without rows
        torch.full((4, 1), 3),
        torch.empty(0, 2, dtype=torch.int64),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_combine(device, groups, dtype):
    grouping = Grouping.by(groups.to(device), 3)
    torch.manual_seed(0)
    rows = torch.randn(len(grouping.slot), 22, device=device).to(dtype)[:, :20]  # of a packed buffer
    found = experts.combine(grouping.bag_rows, grouping.bag_starts, rows)
    expected = torch.zeros(len(groups), 20, device=device).index_add_(0, grouping.token, rows.float())
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-5, atol=1e-6)
