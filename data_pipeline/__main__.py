"""Prepare the data of a run, check a prepared folder, look at rows as the model sees them.

python -m data_pipeline experiment=NAME [key=value ...]
python -m data_pipeline verify DIR
python -m data_pipeline inspect ROW|SOURCE|SOURCE:ROW experiment=NAME [key=value ...]
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

from data_pipeline.config import DataError
from data_pipeline.packing import make_plans
from data_pipeline.prepare import prepare
from data_pipeline.shards import verify
from trainer.cli import compose_and
from trainer.config import ConfigError, RunConfig


def prepare_here(cfg: DictConfig) -> int:
    """Read the sources and write token shards; what is done already is left alone."""
    config = RunConfig.load(cfg)
    if problems := [*config.model.problems(), *config.data.problems()]:
        raise ConfigError(problems)
    prepare(config.data, config.model.vocab_size, config.seed)
    make_plans(config.data, config.stage.seq_len)
    print(f"Next: python -m trainer experiment=... with the same data (data.dir={config.data.dir})")
    return 0


def verify_here(folder: str) -> int:
    """Read every byte of a prepared folder; say what it holds, or what is damaged."""
    try:
        shards = verify(Path(folder)).shards()
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{folder} is whole: {sum(shard.tokens for shard in shards):,} tokens in {len(shards)} shards")
    return 0


def main(arguments: list[str]) -> None:
    """The command line; exits with its code."""
    if arguments[:1] == ["verify"] and len(arguments) == 2:
        sys.exit(verify_here(arguments[1]))
    if arguments[:1] == ["inspect"] and len(arguments) >= 2:
        from data_pipeline.inspect import show  # imports torch, which workers have no use for

        def inspect_here(cfg: DictConfig) -> int:
            config = RunConfig.load(cfg)
            print(show(config.data, arguments[1], seq_len=config.stage.seq_len, seed=config.seed))
            return 0

        sys.argv[1:] = arguments[2:]  # the rest is Hydra's
        compose_and("prepare", inspect_here)
    compose_and("prepare", prepare_here)


if __name__ == "__main__":
    main(sys.argv[1:])
