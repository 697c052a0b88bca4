"""`python -m data_pipeline experiment=NAME`: prepare the data of a run."""

from omegaconf import DictConfig

from data_pipeline.prepare import prepare
from data_pipeline.rows import make_plans
from trainer.cli import compose_and
from trainer.config import ConfigError, RunConfig


def prepare_here(cfg: DictConfig) -> int:
    """Read the sources and write token shards; what is done already is left alone."""
    config = RunConfig.load(cfg)
    problems = [*config.model.problems(), *config.data.problems()]
    if problems:
        raise ConfigError(problems)
    prepare(config.data, config.model.vocab_size, config.seed)
    make_plans(config.data, config.stage.seq_len)
    print(f"Next: python -m trainer experiment=... with the same data (data.dir={config.data.dir})")
    return 0


if __name__ == "__main__":
    compose_and("prepare", prepare_here)
