"""Held-out loss per source. Touches no training state: no gradient, no balance counts, its own rows."""

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loader import Loader
from trainer.config import RunConfig
from trainer.engine import Engine
from trainer.parallel import ParallelPlan
from trainer.runtime import Ranks


@torch.no_grad()
def evaluate(
    engine: Engine, selection_bias: Tensor | None, config: RunConfig, plan: ParallelPlan, ranks: Ranks
) -> dict[str, float]:
    """Cross entropy per labelled token: `loss/<source>` for each source, `loss/validation` over all of them.

    Every rank must call it; rows are dealt out like those of training.
    """
    sums = torch.zeros(len(config.data.sources), 2, dtype=torch.float64, device=ranks.device)
    rows_at_once = plan.world_size * plan.micro_batch_size
    for index, source in enumerate(config.data.sources):
        loader = Loader(
            config.data,
            seq_len=config.stage.seq_len,
            global_batch_size=rows_at_once,
            micro_batch_size=plan.micro_batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=config.seed,
            split="validation",
            source=source,
        )
        try:
            for number, micro_batches in enumerate(loader):
                if number * rows_at_once >= config.evaluate.rows:
                    break
                for batch in micro_batches:
                    batch.labels[[row >= config.evaluate.rows for row in batch.rows]] = -100
                    output = engine.forward(batch.to(ranks.device), selection_bias)
                    assert output.cross_entropy_sum is not None
                    sums[index, 0] += output.cross_entropy_sum
                    sums[index, 1] += (batch.labels != -100).sum()
        finally:
            loader.close()
    dist.all_reduce(sums)
    losses = {
        f"loss/{source}": float(total / count)
        for source, (total, count) in zip(config.data.sources, sums, strict=True)
        if count > 0
    }
    total, count = sums.sum(dim=0)
    return {**losses, "loss/validation": float(total / count)} if count > 0 else losses
