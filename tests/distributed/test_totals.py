"""What the ranks agree on at the start of a step."""

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from data_pipeline.loader import Batch
from trainer.engine.loss import Totals, agree_on_totals


def batch(labels: int, tokens: int) -> Batch:
    """A row of 8 positions of which the first `tokens` are text and the first `labels` have a label."""
    row = torch.arange(8).unsqueeze(0)
    borders = torch.tensor([0, 8], dtype=torch.int32)
    return Batch.of(row, torch.where(row < labels, row, -100), row, borders, row < tokens, (0,))


def agree(flags: list[tuple[bool, bool]]) -> list[Totals]:
    """On rank r, two micro-batches; stop and written as in `flags[r]`, then turned round, then for all."""
    mine = [batch(2, 5), batch(0, 8)] if dist.get_rank() == 0 else [batch(7, 7), batch(1, 3)]
    stop, written = flags[dist.get_rank()]
    return [
        agree_on_totals(mine, stop, written),
        agree_on_totals(mine, False, True),
        agree_on_totals(mine, False),
    ]


@pytest.mark.parametrize("flags", [[(True, False), (False, True)], [(False, True), (True, False)]])
def test_totals_are_over_ranks_and_micro_batches(flags: list[tuple[bool, bool]]) -> None:
    one_stops = Totals(10, 23, 32, stop=True, written=False)
    all_have_written = Totals(10, 23, 32, stop=False, written=True)
    nobody = Totals(10, 23, 32, stop=False, written=False)
    assert run_ranks(agree, 2, flags) == [[one_stops, all_have_written, nobody]] * 2
