"""What data a run reads: types and laws. The values live in conf/data/*.yaml."""

import math
import re
from dataclasses import dataclass

CHOICES = {
    "mode": ("prepared", "streaming"),
    "on_bad_row": ("skip", "quarantine", "error"),
    "packing": ("concat", "best_fit"),
}
LEAST = {
    "min_characters": (1, "1 leaves out nothing"),
    "max_chat_tokens": (1, "null = no limit"),
    "slice_bytes": (1, "use 134_217_728"),
    "shard_bytes": (4, "a token takes 4 bytes"),
    "num_workers": (1, "1 works in this process"),
}
SOURCE_KINDS = ("embedded", "jsonl", "parquet", "arrow", "hub", "text", "tree", "sft")
KINDS_WITH_TEXT_COLUMN = ("jsonl", "parquet", "arrow", "hub")
CONTENT_KEYS = (
    *("tokenizer_vocab_size", "validation_fraction", "deduplicate", "min_characters"),
    *("max_chat_tokens", "think_flag_share"),
)
BLOCK_ROWS = 16384  # the mixture holds its weights exactly, to one row, over each block of this many rows


class DataError(Exception):
    """A file that the data pipeline reads or wrote breaks a law; the message names file, law and remedy."""


@dataclass
class SourceConfig:
    """One source of documents.

    kind: embedded (text found on every machine) | jsonl (.jsonl, .jsonl.gz, .jsonl.zst) | parquet | arrow |
    hub (datasets of the Hugging Face hub) | text (a file is a document) | tree (folders; every text file
    below is a document) | sft (conversations: rows with `messages`, in files of any of these formats).
    paths: files or globs; for `tree` folders; for `hub` NAME[@REVISION][:CONFIG]:SPLIT; for `embedded` the
    names of collections of data_pipeline.samples.
    """

    kind: str
    paths: list[str]
    text_key: str | None  # the column or JSON key that holds the text; null for the kinds that have none
    weight: float  # share of the training tokens, relative to the other sources; 0 = prepared, not trained on
    max_epochs: float | None  # how often a training row may be seen; null = no limit


@dataclass
class DataConfig:
    """What a run reads, and how it is prepared.

    packing: concat (documents end to end, cut where a row ends) | best_fit (whole documents, combined so that
    little padding is left; longer ones in near-equal pieces, longer conversations left out).
    length_shares: {} = documents of every length. Else, for best_fit: shares of the tokens by the length of
    their document: {4096: 0.25, 16384: 0.75} takes 25 % from documents of 4096 to 16383 tokens and 75 % from
    longer ones, of all sources together; a source's weight is then the share of its documents that is taken,
    relative to the source with the largest.
    """

    mode: str  # prepared (token shards in `dir`) | streaming (text is tokenized while it is read)
    dir: str  # folder of the prepared shards
    tokenizer: str | None  # a folder, a tokenizer.json, a hub name; null = train one on the sources
    tokenizer_vocab_size: int | None  # ids of the tokenizer to train; null when `tokenizer` is given
    sources: dict[str, SourceConfig]  # by name, which is part of file names and metrics
    validation_fraction: float  # share of the documents, chosen by their hash, that is never trained on
    deduplicate: bool  # keep the first of equal documents of a source
    min_characters: int  # shorter documents are bad rows (too_short); conversations are not concerned
    max_chat_tokens: int | None  # longer conversations are bad rows (too_long); null = no limit
    think_flag_share: float | None  # /no_think where no reasoning, /think in this share of others; null: none
    on_bad_row: str  # skip (list it in rejects.jsonl) | quarantine (keep the whole row there) | error (stop)
    max_bad_fraction: float  # share of bad rows beyond which a source is broken and nothing is prepared
    slice_bytes: int  # bytes of input in one unit of work, of restart and of parallelism
    shard_bytes: int  # most bytes in one file of tokens (a longer document has a shard of its own)
    num_workers: int  # processes that prepare; 1 = this one. The result does not depend on it
    packing: str
    length_shares: dict[int, float]
    predict_first_token: bool  # whether the end of a document predicts the first token of the next one
    fim_rates: dict[str, float]  # source -> share of its documents rearranged for fill-in-the-middle
    fim_spm_share: float  # share of these that have the suffix first (SPM; else PSM)
    weight_changes: dict[int, dict[str, float]]  # training tokens -> weights from then on; others stay
    skip: list[list[int]]  # ranges [first, end) of global row numbers that are left out

    def content_settings(self) -> dict[str, object]:
        """The keys that decide which tokens a prepared folder holds, apart from the bytes of its inputs."""
        settings = {f"data.{key}": getattr(self, key) for key in CONTENT_KEYS}
        for name, source in sorted(self.sources.items()):
            settings[f"data.sources.{name}.kind"] = source.kind
            settings[f"data.sources.{name}.text_key"] = source.text_key
        return settings

    def trained_sources(self) -> set[str]:
        """The names of the sources that have a weight at some time of the run."""
        weights = [{name: source.weight for name, source in self.sources.items()}]
        weights += self.weight_changes.values()
        return {name for of in weights for name, weight in of.items() if weight > 0}

    def problems(self) -> list[str]:
        """Every broken law, one line each: key, value, law, remedy."""
        found = []
        for key, choices in CHOICES.items():
            if (value := getattr(self, key)) not in choices:
                found.append(f"data.{key}={value} is unknown; use {', '.join(choices)}")
        for key, (least, why) in LEAST.items():
            if (number := getattr(self, key)) is not None and number < least:
                found.append(f"data.{key}={number} is less than {least}; {why}")
        for key, share in (
            ("max_bad_fraction", self.max_bad_fraction),
            ("think_flag_share", self.think_flag_share),
            ("fim_spm_share", self.fim_spm_share),
            *((f"fim_rates.{name}", rate) for name, rate in self.fim_rates.items()),
        ):
            if share is not None and not 0 <= share <= 1:
                found.append(f"data.{key}={share} is not in [0, 1]")
        if not 0 <= self.validation_fraction < 1:
            found.append(f"data.validation_fraction={self.validation_fraction} is not in [0, 1)")
        if not self.dir:
            found.append("data.dir is empty; name the folder of the prepared shards")
        ids = f"data.tokenizer_vocab_size={self.tokenizer_vocab_size}"
        if self.tokenizer is None and (self.tokenizer_vocab_size or 0) < 512:
            found.append(f"{ids}: a tokenizer that is trained (data.tokenizer=null) needs at least 512 ids")
        if self.tokenizer is not None and self.tokenizer_vocab_size is not None:
            found.append(f"{ids} has no use with data.tokenizer={self.tokenizer}; set one of the two to null")
        if not self.sources:
            found.append("data.sources is empty; name at least one source")
        total_weight = sum(source.weight for source in self.sources.values())
        for name, source in self.sources.items():
            found += _source_problems(name, source, total_weight)
        if self.sources and not total_weight > 0:
            law = f"the weights sum to {total_weight}; give one source a positive weight"
            found.append(f"data.sources: {law}")
        if self.mode == "streaming":
            found += _streaming_problems(self)
        return found + _order_problems(self)


def _streaming_problems(config: DataConfig) -> list[str]:
    """What text that is read once, from its start, cannot do."""
    remedy = "; change it, or prepare the data and use data.mode=prepared"
    broken = {
        "data.tokenizer=null would need one to be trained": config.tokenizer is None,
        f"data.packing={config.packing} needs all lengths": config.packing != "concat",
        "data.on_bad_row=quarantine has no folder to keep rows in": config.on_bad_row == "quarantine",
    }
    for name, source in config.sources.items():
        law = f"data.sources.{name}.max_epochs={source.max_epochs} is no whole number"
        broken[law] = source.max_epochs is not None and source.max_epochs % 1 > 0
    return [f"data.mode=streaming: {law}{remedy}" for law, is_broken in broken.items() if is_broken]


def _order_problems(config: DataConfig) -> list[str]:
    found = []
    for name in config.fim_rates:
        if name not in config.sources or config.sources[name].kind == "sft":
            found.append(f"data.fim_rates.{name} is no source of text; name one, or remove it")
    shares = config.length_shares
    if shares and config.packing != "best_fit":
        found.append(f"data.length_shares={shares} needs data.packing=best_fit; set it to {{}}")
    if shares and (min(shares) < 1 or not all(0 < s <= 1 for s in shares.values())):
        found.append(f"data.length_shares={shares}: lengths are above 0 and shares in (0, 1]")
    if shares and abs(sum(shares.values()) - 1) > 1e-9:
        found.append(f"data.length_shares={shares}: the shares sum to {sum(shares.values())}, not 1")
    if shares and config.weight_changes:
        found.append("data.weight_changes has no use with data.length_shares; set one of them to {}")
    weights = {name: source.weight for name, source in config.sources.items()}
    for tokens, changed in sorted(config.weight_changes.items()):
        key = f"data.weight_changes.{tokens}"
        if tokens < 1:
            found.append(f"{key}: the number of tokens is not positive; the first weights stand in sources")
        for name in sorted(changed.keys() - weights.keys()):
            found.append(f"{key}.{name} is no source; use {', '.join(weights)}")
        weights |= changed
        if not all(0 <= weight < math.inf for weight in changed.values()) or not sum(weights.values()) > 0:
            found.append(f"{key}={changed}: weights are finite numbers >= 0, at least one above 0")
    ends = [0]
    for span in config.skip:
        if len(span) != 2 or not ends[-1] <= span[0] < span[1]:
            found.append(f"data.skip: {span} is no range [first, end) after the last one; sort and join them")
            break
        ends.append(span[1])
    return found


def _source_problems(name: str, source: SourceConfig, total_weight: float) -> list[str]:
    key = f"data.sources.{name}"
    found = []
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        found.append(f"{key}: the name becomes a file name; use letters, digits and _")
    if source.kind not in SOURCE_KINDS:
        found.append(f"{key}.kind={source.kind} is unknown; use {', '.join(SOURCE_KINDS)}")
    if not source.paths:
        found.append(f"{key}.paths is empty")
    has_columns = source.kind in KINDS_WITH_TEXT_COLUMN
    if has_columns and not source.text_key:
        found.append(f"{key}.text_key={source.text_key}: {source.kind} needs the name of the text column")
    if not has_columns and source.text_key is not None:
        found.append(f"{key}.text_key={source.text_key} has no use with kind={source.kind}; set it to null")
    if not 0 <= source.weight < math.inf:
        found.append(f"{key}.weight={source.weight} is not a finite number >= 0")
    elif 0 < source.weight * BLOCK_ROWS < total_weight:
        law = f"is less than one row in {BLOCK_ROWS}; raise it or use 0"
        found.append(f"{key}.weight={source.weight} of {total_weight} {law}")
    if source.max_epochs is not None and not source.max_epochs > 0:
        found.append(f"{key}.max_epochs={source.max_epochs} is not positive; null = no limit")
    return found
