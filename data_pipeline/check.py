"""Check that the data of a run exists and fits the model. Does not import torch."""

from pathlib import Path

from data_pipeline.config import DataConfig
from data_pipeline.shards import open_prepared
from data_pipeline.streaming import TextStream
from data_pipeline.tokenizer import check_vocab_size, tokenizer_of


def check_data(config: DataConfig, vocab_size: int, seed: int) -> None:
    """Raises DataError if the data is not prepared for this run, is damaged, or does not fit the model.

    `vocab_size` is that of the model. In streaming mode the sources are opened and their first rows are read.
    """
    if config.mode == "streaming":
        tokenizer = tokenizer_of(config)
        for name in sorted(config.trained_sources()):
            TextStream(config, name, tokenizer, seed)
        known = tokenizer.vocab_size
    else:
        folder = Path(config.dir)
        manifest = open_prepared(folder)
        manifest.check_settings(config.content_settings(), folder)
        known = manifest.tokenizer.vocab_size
    check_vocab_size(known, vocab_size)
