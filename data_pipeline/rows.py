"""The rows of every source of a prepared folder, packed as the configuration says."""

from pathlib import Path

from data_pipeline.best_fit import BestFitRows, PackedSource
from data_pipeline.config import DataConfig
from data_pipeline.fim import FillInTheMiddle, FimIds
from data_pipeline.manifest import SPLITS, Manifest
from data_pipeline.packing import ConcatRows
from data_pipeline.shards import TokenStream, open_prepared
from data_pipeline.tokenizer import load_tokenizer

JOINT = "joint"  # the name of what several sources fill together, under length_shares


def open_rows(
    config: DataConfig,
    manifest: Manifest,
    streams: dict[str, TokenStream],
    split: str,
    seq_len: int,
    seed: int,
) -> dict[str, ConcatRows | BestFitRows]:
    """The rows of each stream, by source; under length_shares the training rows of all together, as `JOINT`.
    Plans that best_fit needs and that are not there are made.

    Training documents are rearranged for fill-in-the-middle, validation documents are not; the rest of a
    validation stream under concat gets a padded row. Raises DataError for a tokenizer without control tokens
    that are needed.
    """
    folder, end_of_text = Path(config.dir), manifest.tokenizer.end_of_text
    is_train = split == "train"
    fims = _fill_in_the_middle(config, folder, seed) if is_train else {}
    if config.packing == "concat":
        return {
            name: ConcatRows(stream, seq_len, end_of_text, pad=not is_train, fim=fims.get(name))
            for name, stream in streams.items()
        }
    sources = {
        name: PackedSource(stream, config.sources[name].weight, fims.get(name))
        for name, stream in streams.items()
    }
    if config.length_shares and is_train:
        plan = f"{JOINT}-{split}"
        return {JOINT: BestFitRows(folder, plan, sources, seq_len, end_of_text, config.length_shares)}
    return {
        name: BestFitRows(folder, f"{name}-{split}", {name: source}, seq_len, end_of_text, {})
        for name, source in sources.items()
    }


def make_plans(config: DataConfig, seq_len: int) -> None:
    """Make the plans of best_fit that a run with rows of `seq_len` opens, if they are not there."""
    folder = Path(config.dir)
    manifest = open_prepared(folder)
    for split in SPLITS:
        names = config.trained_sources() if split == "train" else set(config.sources)
        streams = {name: s for name, s in open_streams(folder, manifest, split).items() if name in names}
        for name, rows in open_rows(config, manifest, streams, split, seq_len, seed=0).items():
            if split == "train":
                print(f"  {describe_rows(name, rows, seq_len)}", flush=True)


def open_streams(folder: Path, manifest: Manifest, split: str) -> dict[str, TokenStream]:
    """The tokens of a split, by source."""
    return {name: TokenStream(folder, of.splits[split].shards) for name, of in manifest.sources.items()}


def describe_rows(name: str, rows: ConcatRows | BestFitRows, seq_len: int) -> str:
    """What an epoch of a source is, in one line."""
    if isinstance(rows, ConcatRows):
        return f"{name}: {len(rows):,} rows of {seq_len}"
    report = rows.report
    return (
        f"{name}: {report.documents:,} documents in {report.rows:,} rows of {seq_len},"
        f" {report.padding(seq_len):.2%} padding"
        + (f", {report.too_long:,} longer than a row" if report.too_long else "")
        + (f", {report.tokens_not_taken:,} tokens left out" if report.tokens_not_taken else "")
    )


def _fill_in_the_middle(config: DataConfig, folder: Path, seed: int) -> dict[str, FillInTheMiddle]:
    rates = {name: rate for name, rate in config.fim_rates.items() if rate > 0}
    if not rates:
        return {}
    tokenizer = load_tokenizer(folder)
    ids = FimIds(*(tokenizer.control_id(f"<|fim_{part}|>") for part in ("prefix", "middle", "suffix")))
    return {
        name: FillInTheMiddle(rate, config.fim_spm_share, ids, seed, name) for name, rate in rates.items()
    }
