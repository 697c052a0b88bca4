"""`python -m trainer.evaluate RUN_DIR|CHECKPOINT`: held-out losses, or rewards, of a run by data source."""

import argparse
import sys
from contextlib import closing
from pathlib import Path

from data_pipeline.config import DataError
from data_pipeline.loader import Batch
from moe.config import ConfigError
from moe.model import ModelOutput
from trainer.checkpoints.weights import device_for, load_model, selection_bias
from trainer.engine.cpu_products import fast_products
from trainer.ranks.runtime import Ranks
from trainer.settings.config import RunConfig
from trainer.settings.run_folder import hf_folder, run_of
from trainer.stages.completer import Completer
from trainer.stages.held_out import held_out_losses


def evaluate_checkpoint(source: Path) -> dict[str, float]:
    """The losses or rewards of a checkpoint, or of a run's newest one, on its held-out data, in one process.

    Raises ConfigError or DataError if `source` is neither of the two, or if its data is missing.
    """
    run_dir = run_of(source)
    config, folder = RunConfig.of_run(run_dir), hf_folder(source)
    if config.data.mode == "streaming":
        why = f"{run_dir} was trained with data.mode=streaming, which keeps no held-out rows"
        raise ConfigError([f"{why}; prepare the data and train with data.mode=prepared to evaluate"])
    device = device_for(source)
    ranks = Ranks(0, 0, 1, device)
    model, bias = load_model(folder, device), selection_bias(folder, device)

    def forward(batch: Batch) -> ModelOutput:
        rows = (batch.input_ids, batch.position_ids, batch.cu_seqlens)
        return model(*rows, labels=batch.labels, selection_bias=bias, lengths=batch.lengths)

    with fast_products(device, model.lm_head.weight.dtype):
        if config.rl is None:
            return held_out_losses(forward, config, ranks)
        with closing(Completer(config, ranks, model)) as completer:
            return completer.held_out_rewards(0, bias)


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate", description=__doc__)
    parser.add_argument("source", type=Path, help="run folder (its newest checkpoint) or checkpoint")
    source = parser.parse_args(arguments).source
    try:
        for key, value in evaluate_checkpoint(source).items():
            print(f"{key} {value:.6f}" + (" nats per token" if key.startswith("loss") else ""))
    except (ConfigError, DataError, OSError) as error:
        print(f"{source} cannot be evaluated: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
