"""The rows of a run, and the loss on its held-out rows. `trainer.evaluate` imports it without DeepSpeed."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.loader import Batch, Loader
from moe.model import ModelOutput
from trainer.ranks.runtime import Ranks
from trainer.settings.config import RunConfig


def open_loader(config: RunConfig, ranks: Ranks, **settings: Any) -> Loader:
    """A Loader of this rank's rows; `settings` override the arguments from the run."""
    of_run: dict[str, Any] = {
        "seq_len": config.stage.seq_len,
        "global_batch_size": config.stage.global_batch_size,
        "micro_batch_size": config.micro_batch_size,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "seed": config.seed,
        "pin": ranks.device.type == "cuda",
    }
    return Loader(config.data, **(of_run | settings))


@torch.no_grad()
def held_out_losses(
    forward: Callable[[Batch], ModelOutput], config: RunConfig, ranks: Ranks
) -> dict[str, float]:
    """Cross entropy per labelled token: `loss/<source>` for each source, `loss/validation` over all of them.

    Every rank must call it; rows are distributed over ranks as in training.
    """
    sources = config.data.text_sources()
    sums = torch.zeros(len(sources), 2, dtype=torch.float64, device=ranks.device)
    rows_at_once = ranks.world_size * config.micro_batch_size
    for index, source in enumerate(sources):
        held_out = {"global_batch_size": rows_at_once, "split": "validation", "source": source}
        with open_loader(config, ranks, **held_out) as loader:
            for micro_batches in islice(loader, -(-config.evaluate.rows // rows_at_once)):
                for batch in micro_batches:
                    batch.labels[[row >= config.evaluate.rows for row in batch.rows]] = -100
                    output = forward(batch.to(ranks.device))
                    assert output.cross_entropy_sum is not None
                    sums[index, 0] += output.cross_entropy_sum
                    sums[index, 1] += (batch.labels != -100).sum()
    if dist.is_initialized():
        dist.all_reduce(sums)
    named = zip([*sources, "validation"], [*sums, sums.sum(dim=0)], strict=True)
    return {f"loss/{source}": float(total / count) for source, (total, count) in named if count > 0}
