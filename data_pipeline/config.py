"""What data a run reads: types and laws. The values live in conf/data/*.yaml."""

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

CHOICES = {
    "mode": ("prepared", "streaming"),
    "on_bad_row": ("skip", "quarantine", "error"),
    "packing": ("concat", "best_fit"),
    "deduplicate": ("none", "exact", "minhash"),
}
LEAST = {
    "min_characters": (1, "1 leaves out nothing"),
    "max_chat_tokens": (1, "null = no limit"),
    "slice_bytes": (1, "use 134_217_728"),
    "shard_bytes": (4, "a token takes 4 bytes"),
    "num_workers": (1, "1 works in this process"),
}
SOURCE_KINDS = ("embedded", "jsonl", "parquet", "arrow", "hub", "text", "tree", "sft", "prompts")
KINDS_WITH_TEXT_COLUMN = ("jsonl", "parquet", "arrow", "hub")
CHAT_KINDS = ("sft", "prompts")  # a row is a conversation with its fields, not a text
FORM_COLUMNS = {  # what each form of conversations calls its columns; all may have system and tools
    "messages": ("messages", "system", "tools"),
    "sharegpt": ("messages", "system", "tools"),
    "alpaca": ("instruction", "input", "output", "history", "system", "tools"),
    "prompt_completion": ("prompt", "completion", "chosen", "label", "system", "tools"),
}
MESSAGE_KEYS = ("role", "content", "reasoning_content", "tool_calls", "weight", "masked")
MESSAGE_ROLES = ("system", "user", "assistant", "tool", "function_call")
NAMING_KEYS = ("columns", "message_keys", "roles")  # of a source: what its conversations call things
# The files of templates/, of which qwen3 is also code (chat.py), and the rest are as released.
CHAT_TEMPLATES = ("qwen3", "qwen3_2507_instruct", "qwen3_5")
CONTENT_KEYS = (
    *("tokenizer_vocab_size", "validation_fraction", "deduplicate", "min_characters"),
    *("max_chat_tokens", "think_flag_share"),
)
_NAME = re.compile(r"[A-Za-z0-9_]+")
BLOCK_ROWS = 16384  # the mixture holds its weights exactly, to one row, over each block of this many rows


class DataError(Exception):
    """A file that the data pipeline reads or wrote is wrong; the message names file, rule and remedy."""


def read_template(name: str) -> str:
    """The text of a chat template: one of CHAT_TEMPLATES, or a file. Raises DataError for another file."""
    path = Path(__file__).parent / f"templates/{name}.jinja" if name in CHAT_TEMPLATES else Path(name)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        known = ", ".join(CHAT_TEMPLATES)
        remedy = f"name a file in UTF-8 that holds a chat template, or use {known}"
        raise DataError(f"the chat template {name} cannot be read ({error}); {remedy}") from error


@dataclass
class SourceConfig:
    """One source of documents. docs/data.md says what `paths` and a document are for each kind."""

    kind: str
    paths: list[str]  # files, globs, folders, hub datasets, or collections of data_pipeline.samples
    text_key: str | None = None  # column or JSON key of the text, for the kinds that have one; null = text
    weight: float = 1.0  # share of the training tokens (of the prompts), relative to the others; 0: unused
    max_epochs: float | None = None  # how often a training row may be seen; null = no limit
    required_fields: list[str] | None = None  # of prompts: what verifiers need in a row; null = [answer]
    # Of sft and prompts; null = the usual names, which docs/data.md lists.
    format: str = "auto"  # the form of its conversations, of FORM_COLUMNS; auto = the first that a row fits
    columns: dict[str, str] | None = None  # what the form calls a column -> the column here
    message_keys: dict[str, str] | None = None  # what a message says, of MESSAGE_KEYS -> the key here
    roles: dict[str, str] | None = None  # a role here -> what it is, of MESSAGE_ROLES

    @property
    def text_column(self) -> str | None:
        """The column that holds the text; None for the kinds without columns of text, and for prompts that
        stand in `prompt` or `messages`."""
        return "text" if self.text_key is None and self.kind in KINDS_WITH_TEXT_COLUMN else self.text_key

    @property
    def verified_fields(self) -> list[str]:
        """The fields without which a row of prompts is bad."""
        return ["answer"] if self.required_fields is None else self.required_fields


@dataclass
class WeightsConfig:
    """How the shares of the sources follow from their weights and sizes."""

    alpha: float  # share of a source ~ weight * (its tokens)^alpha; 0: the weights alone; 1: also its size


@dataclass
class DataConfig:
    """What a run reads, and how it is prepared; docs/data.md has more on each key."""

    mode: str  # prepared (token shards in `dir`) | streaming (text is tokenized while it is read)
    dir: str  # folder of the prepared shards
    tokenizer: str | None  # a folder, a tokenizer.json, a hub name; null = train one on the sources
    tokenizer_vocab_size: int | None  # ids of the tokenizer to train; null when `tokenizer` is given
    sources: dict[str, SourceConfig]  # by name, which is part of file names and metrics
    validation_fraction: float  # share of the documents, chosen by their hash, that is never trained on
    deduplicate: str  # keep the first of a source's equal documents (exact) or similar texts (minhash) | none
    exclude: list[str]  # files of texts (benchmarks): documents that share 13 words in a row are left out
    min_characters: int  # shorter documents are bad rows (too_short); not for conversations and prompts
    chat_template: str  # what renders conversations and prompts: one of CHAT_TEMPLATES, or a file NAME.jinja
    max_chat_tokens: int | None  # longer conversations and prompts are bad rows (too_long); null = no limit
    think_flag_share: float | None  # /no_think without reasoning, /think in this share of others; null: none
    on_bad_row: str  # skip (list it in rejects.jsonl) | quarantine (keep the whole row there) | error (stop)
    max_bad_fraction: float  # with a larger share of bad rows in a source, nothing is prepared
    slice_bytes: int  # bytes of input that a process prepares, and a restart repeats, as one unit
    shard_bytes: int  # most bytes in one file of tokens (a longer document has a shard of its own)
    num_workers: int  # processes that prepare; 1 = this one. The result does not depend on it
    packing: str  # concat (documents end to end, cut where a row ends) | best_fit (whole documents, padded)
    length_shares: dict[int, float]  # least length of a document -> share of the tokens; {} = every length
    predict_first_token: bool  # whether the end of a document predicts the first token of the next one
    fim_rates: dict[str, float]  # source -> share of its documents rearranged for fill-in-the-middle
    fim_spm_share: float  # share of these that have the suffix first (SPM; else PSM)
    weights: WeightsConfig
    weight_changes: dict[int, dict[str, float]]  # training tokens (prompts) -> weights from then on
    skip: list[list[int]]  # ranges [first, end) of global numbers of rows (prompts) that are left out

    def content_settings(self) -> dict[str, object]:
        """The keys that decide which tokens a prepared folder holds, apart from the bytes of its inputs.

        Raises DataError for a chat template that cannot be read.
        """
        settings = {f"data.{key}": getattr(self, key) for key in CONTENT_KEYS}
        named = {"exact": True, "none": False}  # as folders of earlier versions call them
        settings["data.deduplicate"] = named.get(self.deduplicate, self.deduplicate)
        settings["data.chat_template"] = None  # so are folders of an earlier version, which are of qwen3
        if self.chat_template != "qwen3" and any(of.kind in CHAT_KINDS for of in self.sources.values()):
            digest = hashlib.sha256(read_template(self.chat_template).encode()).hexdigest()
            settings["data.chat_template"] = f"sha256 {digest}"
        for name, source in sorted(self.sources.items()):
            settings[f"data.sources.{name}.kind"] = source.kind
            settings[f"data.sources.{name}.text_key"] = source.text_column
            if source.kind == "prompts":
                settings[f"data.sources.{name}.required_fields"] = source.verified_fields
            if source.kind in CHAT_KINDS:  # null where a row means what it means without the key
                settings[f"data.sources.{name}.format"] = None if source.format == "auto" else source.format
                settings |= {
                    f"data.sources.{name}.{key}": getattr(source, key) or None for key in NAMING_KEYS
                }
        return settings

    def text_sources(self) -> list[str]:
        """The names of the sources that are read as rows of tokens to learn, that is, not as prompts."""
        return [name for name, source in self.sources.items() if source.kind != "prompts"]

    def trained_sources(self) -> set[str]:
        """The names of the sources that have a weight at some time of the run."""
        weights = [{name: source.weight for name, source in self.sources.items()}]
        weights += self.weight_changes.values()
        return {name for of in weights for name, weight in of.items() if weight > 0}

    def reading_problems(self, *, as_prompts: bool, source: str | None = None) -> list[str]:
        """Broken laws of a run that samples from prompts (`as_prompts`), or that trains on rows of text. It
        reads the sources that have a weight, or only `source`."""
        names, text = self.trained_sources() if source is None else {source}, set(self.text_sources())
        reads = "samples from prompts" if as_prompts else "trains on text"
        found = [
            f"data.sources.{name}.kind={self.sources[name].kind} cannot be read by a stage that {reads};"
            " set its weight to 0, or choose another stage"
            for name in sorted(names & self.sources.keys())
            if (name in text) == as_prompts
        ]
        if as_prompts and source is None and self.length_shares:
            found.append(f"data.length_shares={self.length_shares} has no use with prompts; set it to {{}}")
        return found

    def problems(self) -> list[str]:
        """Every broken law, one line each: key, value, law, remedy."""
        laws = dict[str, bool]()  # is it broken?
        for key, choices in CHOICES.items():
            value = getattr(self, key)
            laws[f"data.{key}={value} is unknown; use {', '.join(choices)}"] = value not in choices
        for key, (least, why) in LEAST.items():
            value = getattr(self, key)
            laws[f"data.{key}={value} is less than {least}; {why}"] = value is not None and value < least
        shares = {
            key: getattr(self, key) for key in ("max_bad_fraction", "think_flag_share", "fim_spm_share")
        }
        for key, share in (shares | {f"fim_rates.{name}": of for name, of in self.fim_rates.items()}).items():
            laws[f"data.{key}={share} must be a fraction in [0, 1]"] = (
                share is not None and not 0 <= share <= 1
            )
        given, ids, held_out = self.tokenizer, self.tokenizer_vocab_size, self.validation_fraction
        template, flags = self.chat_template, self.think_flag_share
        no_flags = template in CHAT_TEMPLATES[1:] and flags is not None
        weight = sum(source.weight for source in self.sources.values())
        add = "name at least one source: 'data.sources={NAME: {kind: jsonl, paths: [FILES]}}'"
        no_tokenizer = "is null; name one, or train one with data.tokenizer_vocab_size=4096"
        too_few = "a tokenizer that is trained (data.tokenizer=null) needs at least 512 ids"
        no_use = f"has no use with data.tokenizer={given}; set one of the two to null"
        use = f"use {', '.join(CHAT_TEMPLATES)}, or a file NAME.jinja"
        of_qwen3 = "adds flags that only models of data.chat_template=qwen3 know; set it to null"
        laws |= {
            f"data.chat_template={template} is unknown; {use}": (
                template not in CHAT_TEMPLATES and not template.endswith(".jinja")
            ),
            f"data.think_flag_share={flags} {of_qwen3}": no_flags,
            f"data.validation_fraction={held_out} must be a fraction in [0, 1)": not 0 <= held_out < 1,
            "data.dir is empty; name the folder of the prepared shards": not self.dir,
            f"data.tokenizer {no_tokenizer}": given is None and ids is None and self.mode == "prepared",
            f"data.tokenizer_vocab_size={ids}: {too_few}": given is None and ids is not None and ids < 512,
            f"data.tokenizer_vocab_size={ids} {no_use}": given is not None and ids is not None,
            f"data.sources is empty; {add}": not self.sources,
            f"data.sources: the weights sum to {weight}; give one source a positive weight": (
                bool(self.sources) and not weight > 0
            ),
            **self._source_laws(weight),
            **(self._streaming_laws() if self.mode == "streaming" else {}),
            **self._order_laws(),
        }
        return [law for law, is_broken in laws.items() if is_broken]

    def _source_laws(self, total_weight: float) -> dict[str, bool]:
        laws = dict[str, bool]()
        for name, source in self.sources.items():
            key, kind, weight, epochs = f"data.sources.{name}", source.kind, source.weight, source.max_epochs
            column, has_columns = source.text_key, kind in (*KINDS_WITH_TEXT_COLUMN, "prompts")
            law = f"is less than one row in {BLOCK_ROWS}; raise it or use 0"
            laws |= {
                f"{key}: the name becomes a file name; use letters, digits and _": not _NAME.fullmatch(name),
                f"{key}.kind={kind} is unknown; use {', '.join(SOURCE_KINDS)}": kind not in SOURCE_KINDS,
                f"{key}.paths is empty; name files, globs or folders": not source.paths,
                f"{key}.text_key is empty; name the text column, or use null for text": (
                    has_columns and column == ""
                ),
                f"{key}.text_key={column} has no use with kind={kind}; set it to null": (
                    kind in SOURCE_KINDS and not has_columns and column is not None
                ),
                f"{key}.required_fields has no use with kind={kind}; set it to null": (
                    kind in SOURCE_KINDS and kind != "prompts" and source.required_fields is not None
                ),
                f"{key}.weight={weight} must be a finite number >= 0": not 0 <= weight < math.inf,
                f"{key}.weight={weight} of {total_weight} {law}": 0 < weight * BLOCK_ROWS < total_weight,
                f"{key}.max_epochs={epochs} is not positive; null = no limit": epochs is not None
                and not 0 < epochs < math.inf,
            }
            laws |= _form_laws(key, source)
        return laws

    def _streaming_laws(self) -> dict[str, bool]:
        """What text that is read once, from its start, cannot do."""
        laws = {
            "data.tokenizer=null would need a tokenizer to be trained": self.tokenizer is None,
            f"data.packing={self.packing} needs all lengths": self.packing != "concat",
            "data.on_bad_row=quarantine has no folder to keep rows in": self.on_bad_row == "quarantine",
            "data.deduplicate=minhash needs all documents": self.deduplicate == "minhash",
            f"data.weights.alpha={self.weights.alpha} needs the size of each source": self.weights.alpha != 0,
        }
        for name, source in self.sources.items():
            law = f"data.sources.{name}.max_epochs={source.max_epochs} is not a whole number"
            laws[law] = source.max_epochs is not None and source.max_epochs % 1 > 0
            laws[f"data.sources.{name}.kind=prompts needs shards"] = source.kind == "prompts"
        remedy = "; change it, or prepare the data and use data.mode=prepared"
        return {f"data.mode=streaming: {law}{remedy}": is_broken for law, is_broken in laws.items()}

    def _order_laws(self) -> dict[str, bool]:
        shares, key = self.length_shares, f"data.length_shares={self.length_shares}"
        alpha, total = self.weights.alpha, sum(shares.values())
        laws = {
            f"data.weights.alpha={alpha} must be in [0, 1]; 0 uses the weights alone": not 0 <= alpha <= 1
        }
        if shares:
            laws |= {
                "data.weights.alpha has no use with data.length_shares; set it to 0": alpha != 0,
                f"{key} needs data.packing=best_fit; set it to {{}}": self.packing != "best_fit",
                f"{key}: lengths must be above 0 and shares in (0, 1]": (
                    min(shares) < 1 or not all(0 < share <= 1 for share in shares.values())
                ),
                f"{key}: the shares sum to {total} and must sum to 1": abs(total - 1) > 1e-9,
                "data.weight_changes has no use with data.length_shares; set one of them to {}": (
                    bool(self.weight_changes)
                ),
            }
        text = {name for name, source in self.sources.items() if source.kind not in CHAT_KINDS}
        for name in self.fim_rates:
            laws[f"data.fim_rates.{name} is not a source of text; name one, or remove it"] = name not in text
        weights = {name: source.weight for name, source in self.sources.items()}
        for tokens, changed in sorted(self.weight_changes.items()):
            key, known = f"data.weight_changes.{tokens}", ", ".join(weights)
            law = "the number of tokens is not positive; the first weights stand in sources"
            laws[f"{key}: {law}"] = tokens < 1
            laws |= {f"{key}.{name} is not a source; use {known}": name not in weights for name in changed}
            weights |= changed
            are_weights = all(0 <= of < math.inf for of in changed.values()) and sum(weights.values()) > 0
            laws[
                f"{key}={changed}: weights must be finite numbers >= 0, at least one above 0"
            ] = not are_weights
        end = 0
        for span in self.skip:
            law = f"data.skip: {span} is not a range [first, end) after the last one; sort and join them"
            laws[law] = len(span) != 2 or not end <= span[0] < span[1]
            if laws[law]:
                break
            end = span[1]
        return laws


def _form_laws(key: str, source: SourceConfig) -> dict[str, bool]:
    """The laws of how the conversations of a source are named. key: that of the source."""
    kind, form, is_chat = source.kind, source.format, source.kind in CHAT_KINDS
    forms = [form] if form in FORM_COLUMNS else list(FORM_COLUMNS)
    columns = sorted({column for of in forms for column in FORM_COLUMNS[of]})
    law = f"is unknown; use auto, {', '.join(FORM_COLUMNS)}"
    named = {"columns": columns, "message_keys": MESSAGE_KEYS}
    laws = {f"{key}.format={form} {law}": form != "auto" and form not in FORM_COLUMNS}
    for of, known in named.items():
        for name in getattr(source, of) or {}:
            laws[f"{key}.{of}.{name} is unknown; use {', '.join(known)}"] = name not in known
    for role, meaning in (source.roles or {}).items():
        law = f"is not a role; use {', '.join(MESSAGE_ROLES)}"
        laws[f"{key}.roles.{role}={meaning} {law}"] = meaning not in MESSAGE_ROLES
    if form != "auto" and source.text_key is not None:
        law = f"names a prompt, but format={form} says what a row has; set one of them to its default"
        laws[f"{key}.text_key={source.text_key} {law}"] = is_chat
    for of in ("format", *NAMING_KEYS):
        is_set = getattr(source, of) not in (None, {}, "auto")
        laws[f"{key}.{of} has no use with kind={kind}; remove it"] = (
            kind in SOURCE_KINDS and not is_chat and is_set
        )
    return laws
