"""Rows of token streams, with the document borders, positions and labels that the model needs.

A row has at most seq_len + 1 tokens: the inputs, and the targets shifted by one. Packing "concat": the
documents of a source stand end to end, each closed by the end-of-text id; row r is the span of seq_len + 1
tokens that starts at token r * seq_len, so no token is a target twice. "best_fit": see best_fit.py.
"""
# B rows, S seq_len, D documents, N tokens of a row

import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.best_fit import ITEM, STREAM_SHIFT, Bins, PackingReport, Shares, make_plan
from data_pipeline.config import DataConfig, DataError
from data_pipeline.manifest import SPLITS, Manifest, to_json
from data_pipeline.permutation import MASK, derive_key, mix
from data_pipeline.shards import TokenStream, open_prepared, read_arrays
from data_pipeline.streaming import TextStream
from data_pipeline.tokenizer import Tokenizer, tokenizer_of

NO_LOSS = -100
JOINT = "joint"  # the name of the rows that all sources fill together, under length_shares
Stream = TokenStream | TextStream


class Row(NamedTuple):
    """The contents of a row before padding."""

    tokens: np.ndarray  # [N] uint32, N <= S+1
    starts: np.ndarray  # [D] int64: where its documents begin
    learned: np.ndarray  # [N] bool: which tokens may be targets


class PackedRows(NamedTuple):
    """The arrays of a batch of rows."""

    input_ids: np.ndarray  # [B,S] int64
    labels: np.ndarray  # [B,S] int64: the target of position t; NO_LOSS where there is none
    position_ids: np.ndarray  # [B,S] int64, from 0 in every document and every row
    cu_seqlens: np.ndarray  # [D+1] int32: document borders over the flattened B*S tokens
    token_mask: np.ndarray  # [B,S] bool: False on padding


class FillInTheMiddle:
    """Fill-in-the-middle (arXiv 2207.14255) for a share `rate` of the documents; `spm_share` of them use SPM.

    PSM: `<|fim_prefix|> P <|fim_suffix|> S <|fim_middle|> M`; SPM, in the paper's form for joint training:
    `<|fim_prefix|> <|fim_suffix|> S <|fim_middle|> P M`. It is applied to the part of a document that stands
    in a row ("context-level" in the paper); the three ids replace the last three tokens of the suffix, so no
    length changes. Raises DataError for a tokenizer without these ids.
    """

    def __init__(self, rate: float, spm_share: float, tokenizer: Tokenizer, seed: int, source: str) -> None:
        self._rate, self._spm_share, self._end_of_text = rate, spm_share, tokenizer.end_of_text
        ids = (tokenizer.control_id(f"<|fim_{part}|>") for part in ("prefix", "middle", "suffix"))
        self._prefix, self._middle, self._suffix = (np.array([of], dtype=np.uint32) for of in ids)
        self._key = derive_key(seed, "fim", source)

    def __call__(self, document: np.ndarray, position: int) -> np.ndarray:
        """`document`, rearranged or unchanged; its length and a closing end-of-text id stay. The choice is a
        pure function of the seed, the source and `position`, where the document begins in the stream."""
        word = mix((self._key + position) & MASK)
        if _uniform(word) >= self._rate:
            return document
        length = len(document) - int(len(document) > 0 and document[-1] == self._end_of_text)
        body, end, room = document[:length], document[length:], length - 3
        if room < 1:
            return document
        word, is_spm = mix(word), _uniform(mix(word ^ 1)) < self._spm_share
        first, second = sorted((word % (room + 1), mix(word) % (room + 1)))
        prefix, middle, suffix = body[:first], body[first:second], body[second:room]
        if is_spm:
            parts = [self._prefix, self._suffix, suffix, self._middle, prefix, middle]
        else:
            parts = [self._prefix, prefix, self._suffix, suffix, self._middle, middle]
        return np.concatenate([*parts, end])


def _uniform(word: int) -> float:
    """A number in [0, 1) from 64 random bits."""
    return (word >> 11) / 2.0**53


class ConcatRows:
    """The rows of a stream under "concat". Tokens after the last full row are dropped or (`pad`) padded."""

    def __init__(
        self, stream: Stream, seq_len: int, end_of_text: int, *, pad: bool, fim: FillInTheMiddle | None
    ) -> None:
        self._stream, self._seq_len, self._end_of_text, self._fim = stream, seq_len, end_of_text, fim
        targets = max(len(stream) - 1, 0)
        self._rows = -(-targets // seq_len) if pad else targets // seq_len
        self.mean_tokens = min(targets / max(self._rows, 1), seq_len)  # of a row, without padding

    def __len__(self) -> int:
        return self._rows

    def describe(self) -> str:
        """The size of an epoch."""
        return f"{len(self):,} rows of {self._seq_len}"

    def places(self, row: int) -> list[tuple[Stream, int]]:
        """For each document of a row, its stream and the token of the stream where its part begins."""
        return [(self._stream, row * self._seq_len + start) for start in self.read(row).starts.tolist()]

    def read(self, row: int) -> Row:
        """Row number `row`; an empty row beyond the last one."""
        start = min(row * self._seq_len, len(self._stream))
        stop = min(start + self._seq_len + 1, len(self._stream))
        tokens = self._stream.read(start, stop)
        starts = np.append(0, np.flatnonzero(tokens[:-1] == self._end_of_text) + 1)
        if self._fim is not None:
            documents = zip(np.split(tokens, starts[1:]), starts.tolist(), strict=True)
            tokens = np.concatenate([self._fim(ids, start + at) for ids, at in documents])
        return Row(tokens, starts, self._stream.read_loss(start, stop))


class PackedSource(NamedTuple):
    """A stream to pack."""

    stream: TokenStream
    weight: float  # relative share of its documents that is taken, under length_shares
    fim: FillInTheMiddle | None


class BestFitRows:
    """The rows of one source, or of several that fill them together. `name` distinguishes the plans of the
    folder; `shares` are the length_shares. Raises DataError for a plan that is damaged or cannot be written,
    and for a length class without documents.
    """

    def __init__(
        self, folder: Path, name: str, sources: dict[str, PackedSource], seq_len: int, shares: Shares
    ) -> None:
        self._sources, self._seq_len = list(sources.values()), seq_len
        if shares:
            what = to_json([{source: of.weight for source, of in sources.items()}, sorted(shares.items())])
            name += "-" + hashlib.sha256(what).hexdigest()[:8]
        path = folder / "packing" / f"{name}-{seq_len}.npz"
        self._items_path = items_path = path.with_suffix(".items")
        if not path.exists():
            streams, weights = [of.stream for of in self._sources], [of.weight for of in self._sources]
            try:
                make_plan(streams, weights, seq_len, shares, path)
            except OSError as error:  # such as a read-only folder, prepared for another row length
                law = f"{path} is missing and cannot be written ({error})"
                raise DataError(f"{law}; run python -m data_pipeline where it is writable") from error
        try:
            plan = read_arrays(path)
            self.report = PackingReport(*plan["report"].tolist())
            self._bins = Bins(plan["first_bins"], plan["first_parts"], plan["parts"])
            self._first_items = np.cumsum(plan["counts"]) - plan["counts"]  # by length
            self._items = np.memmap(items_path, ITEM, "r") if self.report.documents else np.empty(0, ITEM)
            if len(self._items) != self.report.documents:
                raise ValueError(f"{items_path} has {len(self._items)} items, not {self.report.documents}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}); remove it, it will be made again") from error
        self.mean_tokens = (self.report.tokens - self.report.rows) / max(self.report.rows, 1)

    def __len__(self) -> int:
        return self.report.rows

    def describe(self) -> str:
        """The size of an epoch, and the result of packing."""
        rows, documents, _, too_long, left_out = self.report
        made = f"{documents:,} documents in {rows:,} rows of {self._seq_len}"
        more = f", {too_long:,} longer than a row" if too_long else ""
        more += f", {left_out:,} tokens left out" if left_out else ""
        return f"{made}, {self.report.padding(self._seq_len):.2%} padding{more}"

    def places(self, row: int) -> list[tuple[Stream, int]]:
        """For each document of a row, its stream and the token of the stream where its part begins."""
        return [(source.stream, start) for source, start, _ in self._contents(row)]

    def read(self, row: int) -> Row:
        """Row number `row`; an empty row beyond the last one."""
        tokens, learned, lengths = [], [], []
        for source, start, length in self._contents(row):
            document = source.stream.read(start, start + length)
            if source.fim is not None:
                document = source.fim(document, start)
            tokens.append(document)
            lengths.append(length)
            learned.append(source.stream.read_loss(start, start + length))
        if not tokens:
            return Row(np.empty(0, np.uint32), np.empty(0, np.int64), np.empty(0, np.bool_))
        return Row(np.concatenate(tokens), np.cumsum(lengths) - lengths, np.concatenate(learned))

    def _contents(self, row: int) -> Iterator[tuple[PackedSource, int, int]]:
        """Source, first token and length of each part of a row."""
        for length, item in self._bins.contents(row) if row < len(self) else ():
            place = int(self._items[self._first_items[length] + item])
            number, start = place >> STREAM_SHIFT, place & ((1 << STREAM_SHIFT) - 1)
            if number >= len(self._sources) or start + length > len(self._sources[number].stream):
                what = f"{self._items_path} is damaged: no text has the place {place}"
                raise DataError(f"{what}; remove it and its .npz, they will be made again")
            yield self._sources[number], start, length


def pack_rows(rows: list[Row], seq_len: int, padding_id: int, predict_first_token: bool) -> PackedRows:
    """Turn rows into a batch. The padding at the end of a short row is a document of its own, without loss.
    The last token of a document has no label, because an unrelated document follows, unless
    `predict_first_token`."""
    shape = len(rows), seq_len + 1
    tokens = np.full(shape, padding_id, dtype=np.int64)
    learned, starts = np.ones(shape, dtype=np.bool_), np.zeros(shape, dtype=np.bool_)
    valid = np.zeros((len(rows), seq_len), dtype=np.bool_)  # inputs that have a next token
    for i, row in enumerate(rows):
        length = len(row.tokens)
        tokens[i, :length] = row.tokens
        valid[i, : max(length - 1, 0)] = True
        starts[i, row.starts] = True
        learned[i, :length] = row.learned

    has_label = valid & learned[:, 1:]
    if not predict_first_token:
        has_label &= ~starts[:, 1:]
    labels = np.where(has_label, tokens[:, 1:], NO_LOSS)

    borders = starts[:, :-1] & valid  # [B,S]
    borders[:, 0] = True
    borders[:, 1:] |= valid[:, :-1] & ~valid[:, 1:]
    positions = np.arange(seq_len)
    position_ids = positions - np.maximum.accumulate(np.where(borders, positions, 0), axis=1)
    cu_seqlens = np.append(np.flatnonzero(borders), borders.size).astype(np.int32)
    return PackedRows(tokens[:, :-1], labels, position_ids, cu_seqlens, valid)


def open_streams(
    folder: Path, manifest: Manifest, split: str, names: Collection[str]
) -> dict[str, TokenStream]:
    """The tokens of a split, by source."""
    wanted = {name: of.shards[split] for name, of in manifest.sources.items() if name in names}
    return {name: TokenStream(folder, shards) for name, shards in wanted.items()}


def open_rows(
    config: DataConfig, streams: Mapping[str, Stream], end_of_text: int, split: str, seq_len: int, seed: int
) -> dict[str, ConcatRows | BestFitRows]:
    """The rows of each stream; under length_shares, the training rows of all streams together, as `JOINT`.
    Makes the plans of best_fit that are missing. Validation documents are not rearranged for
    fill-in-the-middle, and their last tokens get a padded row under concat. Raises DataError for a tokenizer
    without the control tokens of fill-in-the-middle."""
    folder, is_train, fims = Path(config.dir), split == "train", dict[str, FillInTheMiddle]()
    if rates := {name: rate for name, rate in config.fim_rates.items() if rate > 0 and is_train}:
        tokenizer, spm = tokenizer_of(config), config.fim_spm_share
        fims = {name: FillInTheMiddle(rate, spm, tokenizer, seed, name) for name, rate in rates.items()}
    rows: dict[str, ConcatRows | BestFitRows] = {}
    sources: dict[str, PackedSource] = {}
    for name, stream in streams.items():
        if config.packing == "concat":
            rows[name] = ConcatRows(stream, seq_len, end_of_text, pad=not is_train, fim=fims.get(name))
        else:
            assert isinstance(stream, TokenStream)  # best_fit is refused for a TextStream
            sources[name] = PackedSource(stream, config.sources[name].weight, fims.get(name))
    if config.length_shares and is_train:
        return {JOINT: BestFitRows(folder, f"{JOINT}-{split}", sources, seq_len, config.length_shares)}
    for name, source in sources.items():
        rows[name] = BestFitRows(folder, f"{name}-{split}", {name: source}, seq_len, {})
    return rows


def make_plans(config: DataConfig, seq_len: int) -> None:
    """Make the missing best_fit plans of a run with rows of `seq_len`, and print the rows of each source."""
    manifest = open_prepared(Path(config.dir))
    for split in SPLITS:
        names = set(config.text_sources())
        names &= config.trained_sources() if split == "train" else names
        streams = open_streams(Path(config.dir), manifest, split, names)
        rows = open_rows(config, streams, manifest.tokenizer.end_of_text, split, seq_len, seed=0)
        for name, of in rows.items() if split == "train" else ():
            lack = "" if len(of) else "; its text is too short for a row: add text, or shorten stage.seq_len"
            print(f"  {name}: {of.describe()}{lack}", flush=True)
