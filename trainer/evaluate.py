"""Held-out loss per source, during training or by `python -m trainer.evaluate RUN_DIR|CHECKPOINT`.

Touches no training state: no gradient, no balance counts, its own rows.
"""

import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.config import DataError
from data_pipeline.loader import Batch, Loader
from moe.config import ConfigError
from moe.model import ModelOutput
from trainer.engine.cpu_products import fast_products
from trainer.generate import device_for, load_model, selection_bias
from trainer.ranks.runtime import Ranks
from trainer.settings.config import RunConfig
from trainer.settings.run_folder import hf_folder, run_of


def open_loader(config: RunConfig, ranks: Ranks, **settings: Any) -> Loader:
    """The rows of a run for this rank; `settings` of Loader go before the run's."""
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
def evaluate(forward: Callable[[Batch], ModelOutput], config: RunConfig, ranks: Ranks) -> dict[str, float]:
    """Cross entropy per labelled token: `loss/<source>` for each source, `loss/validation` over all of them.

    Every rank must call it; rows are dealt out like those of training.
    """
    sums = torch.zeros(len(config.data.sources), 2, dtype=torch.float64, device=ranks.device)
    rows_at_once = ranks.world_size * config.micro_batch_size
    for index, source in enumerate(config.data.sources):
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
    named = zip([*config.data.sources, "validation"], [*sums, sums.sum(dim=0)], strict=True)
    return {f"loss/{source}": float(total / count) for source, (total, count) in named if count > 0}


def evaluate_checkpoint(source: Path) -> dict[str, float]:
    """`evaluate` of a checkpoint, or a run's newest, in one process, on the held-out rows of the run.

    Raises ConfigError or DataError for a source that is neither, or whose data is not there.
    """
    run_dir = run_of(source)
    config, folder = RunConfig.of_run(run_dir), hf_folder(source)
    if config.data.mode == "streaming":
        why = f"{run_dir} was trained with data.mode=streaming, which keeps no held-out rows"
        raise ConfigError([f"{why}; prepare the data and train with data.mode=prepared to evaluate"])
    device = device_for(source)
    model, bias = load_model(folder, device), selection_bias(folder, device)

    def forward(batch: Batch) -> ModelOutput:
        rows = (batch.input_ids, batch.position_ids, batch.cu_seqlens)
        return model(*rows, labels=batch.labels, selection_bias=bias, lengths=batch.lengths)

    with fast_products(device, model.lm_head.weight.dtype):
        return evaluate(forward, config, Ranks(0, 0, 1, device))


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m trainer.evaluate RUN_DIR|CHECKPOINT", file=sys.stderr)
        return 2
    try:
        for key, loss in evaluate_checkpoint(Path(arguments[0])).items():
            print(f"{key} {loss:.6f} nats per token")
    except (ConfigError, DataError, OSError) as error:
        print(f"{arguments[0]} cannot be evaluated: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
