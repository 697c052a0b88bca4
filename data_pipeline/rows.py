"""The rows of every source, packed as the configuration says."""

from collections.abc import Mapping
from pathlib import Path

from data_pipeline.best_fit import BestFitRows, PackedSource
from data_pipeline.config import DataConfig
from data_pipeline.fim import FillInTheMiddle
from data_pipeline.manifest import SPLITS, Manifest
from data_pipeline.packing import ConcatRows, Stream
from data_pipeline.shards import TokenStream, open_prepared
from data_pipeline.tokenizer import tokenizer_of

JOINT = "joint"  # the name of what several sources fill together, under length_shares
Rows = dict[str, ConcatRows | BestFitRows]  # by source


def open_streams(folder: Path, manifest: Manifest, split: str) -> dict[str, TokenStream]:
    """The tokens of a split, by source."""
    return {name: TokenStream(folder, of.shards[split]) for name, of in manifest.sources.items()}


def open_rows(
    config: DataConfig,
    streams: Mapping[str, Stream],
    end_of_text: int,
    *,
    split: str,
    seq_len: int,
    seed: int,
) -> Rows:
    """The rows of each stream; under length_shares the training rows of all together, as `JOINT`. Plans that
    best_fit needs and that are not there are made.

    Training documents are rearranged for fill-in-the-middle, validation documents are not; the rest of a
    validation stream under concat gets a padded row. Raises DataError for a tokenizer without control tokens
    that are needed.
    """
    folder, is_train = Path(config.dir), split == "train"
    fims: dict[str, FillInTheMiddle] = {}
    if rates := {name: rate for name, rate in config.fim_rates.items() if rate > 0 and is_train}:
        tokenizer, spm = tokenizer_of(config), config.fim_spm_share
        fims = {name: FillInTheMiddle(rate, spm, tokenizer, seed, name) for name, rate in rates.items()}
    if config.packing == "concat":
        return {
            name: ConcatRows(stream, seq_len, end_of_text, pad=not is_train, fim=fims.get(name))
            for name, stream in streams.items()
        }
    sources = {
        name: PackedSource(stream, config.sources[name].weight, fims.get(name))
        for name, stream in streams.items()
        if isinstance(stream, TokenStream)  # best_fit is refused for a TextStream
    }
    if config.length_shares and is_train:
        return {JOINT: BestFitRows(folder, f"{JOINT}-{split}", sources, seq_len, config.length_shares)}
    return {
        name: BestFitRows(folder, f"{name}-{split}", {name: source}, seq_len, {})
        for name, source in sources.items()
    }


def make_plans(config: DataConfig, seq_len: int) -> None:
    """Make the plans of best_fit that a run with rows of `seq_len` opens, if they are not there."""
    manifest = open_prepared(Path(config.dir))
    for split in SPLITS:
        names = config.trained_sources() if split == "train" else config.sources
        streams = open_streams(Path(config.dir), manifest, split)
        streams = {name: stream for name, stream in streams.items() if name in names}
        end_of_text = manifest.tokenizer.end_of_text
        rows = open_rows(config, streams, end_of_text, split=split, seq_len=seq_len, seed=0)
        for name, of in rows.items() if split == "train" else ():
            print(f"  {name}: {of.describe()}", flush=True)
