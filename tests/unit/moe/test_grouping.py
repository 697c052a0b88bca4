"""Rows sorted by group, against lists."""

import pytest
import torch

from moe.grouping import Grouping

T, C = 50, 3  # tokens, columns


@pytest.mark.parametrize("num_groups", [1, 2, 127, 128, 255, 256, 257, 700])
def test_rows_are_sorted_by_group_and_keep_their_order(num_groups: int) -> None:
    generator = torch.Generator().manual_seed(num_groups)
    groups = torch.randint(0, num_groups + 1, (T, C), generator=generator)  # num_groups: no row
    groups[7] = num_groups  # a token without rows
    groups[8, 0] = num_groups - 1
    grouping = Grouping.by(groups, num_groups)

    pairs = [(group, slot) for slot, group in enumerate(groups.flatten().tolist()) if group < num_groups]
    slots = [slot for _, slot in sorted(pairs)]
    assert grouping.slot.tolist() == slots
    assert grouping.token.tolist() == [slot // C for slot in slots]
    assert grouping.ends.tolist() == [sum(of <= group for of, _ in pairs) for group in range(num_groups)]
    for given in (len(pairs), lambda: len(pairs)):
        for value, same in zip(Grouping.by(groups, num_groups, given), grouping, strict=True):
            assert torch.equal(value, same)


def test_gather_and_combine_are_adjoint() -> None:
    groups = torch.tensor([[0, 3], [3, 3], [2, 0], [0, 1]])  # of 3 groups; 3: no row
    grouping = Grouping.by(groups, 3)
    tokens = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(grouping.gather(tokens), tokens[[0, 2, 3, 3, 2]])
    combined = torch.stack([rows[0], 0 * rows[0], rows[1] + rows[4], rows[2] + rows[3]])
    torch.testing.assert_close(grouping.combine(rows), combined)
    assert torch.autograd.gradcheck(grouping.gather, tokens)
    assert torch.autograd.gradcheck(grouping.combine, rows)
