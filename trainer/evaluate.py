"""`python -m trainer.evaluate RUN_DIR|CHECKPOINT`: held-out losses, or rewards, of a run by data source."""

import argparse
import os
import sys
from contextlib import closing
from pathlib import Path

from data_pipeline.config import DataError
from data_pipeline.loader import Batch
from moe.config import ConfigError
from moe.model import ModelOutput
from trainer.checkpoints.weights import load_model, ranks_for, selection_bias
from trainer.engine.cpu_products import fast_products
from trainer.ranks.launch import exit_with, launch
from trainer.ranks.runtime import Ranks
from trainer.settings.command import tells_mistakes
from trainer.settings.config import RunConfig
from trainer.settings.run_folder import hf_folder, run_of
from trainer.stages.completer import Completer
from trainer.stages.held_out import held_out_losses


def evaluate_checkpoint(source: Path, ranks: Ranks) -> dict[str, float]:
    """The losses or rewards of a checkpoint, or of a run's newest one, on its held-out data, on all ranks.

    Raises ConfigError or DataError if `source` is neither of the two, or if its data is missing.
    """
    run_dir = run_of(source)
    config, folder = RunConfig.of_run(run_dir), ranks.from_main(lambda: hf_folder(source))
    if config.data.mode == "streaming":
        why = f"{run_dir} was trained with data.mode=streaming, which keeps no held-out rows"
        raise ConfigError([f"{why}; prepare the data and train with data.mode=prepared to evaluate"])
    model, bias = load_model(folder, ranks), selection_bias(folder, ranks.device)

    def forward(batch: Batch) -> ModelOutput:
        rows = (batch.input_ids, batch.position_ids, batch.cu_seqlens)
        return model(*rows, labels=batch.labels, selection_bias=bias, lengths=batch.lengths)

    with fast_products(ranks.device, model.lm_head.weight.dtype):
        if config.rl is None:
            return held_out_losses(forward, config, ranks)
        with closing(Completer(config, ranks, model)) as completer:
            return completer.held_out_rewards(0, bias)


@tells_mistakes
def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate", description=__doc__)
    parser.add_argument("source", type=Path, help="run folder (its newest checkpoint) or checkpoint")
    parser.add_argument("--nproc", type=int, default=1, help="ranks here, which share the experts")
    options = parser.parse_args(arguments)
    source, nproc = options.source, options.nproc
    if nproc < 1:
        parser.error("--nproc must be above 0")
    if nproc > 1 and "RANK" not in os.environ:
        return launch(["trainer.evaluate", *arguments], nproc, "auto")
    try:
        ranks = ranks_for(source)
        for key, value in evaluate_checkpoint(source, ranks).items():
            print(f"{key} {value:.6f}" + (" nats per token" if key.startswith("loss") else ""))
        ranks.leave()
    except (ConfigError, DataError, OSError) as error:
        raise ConfigError(f"{source} cannot be evaluated: {error}") from error
    return 0


if __name__ == "__main__":
    exit_with(main(sys.argv[1:]))
