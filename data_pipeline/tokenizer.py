"""Text to token ids and back. Control tokens are inserted by id and are never made from text."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from data_pipeline.config import DataConfig, DataError

END_OF_TEXT = "<|endoftext|>"
# Qwen3's control tokens, so that a tokenizer trained here has them for every later stage.
CONTROL_TOKENS = (
    END_OF_TEXT,
    *("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
# How Qwen2 and Qwen3 split text before byte-pair encoding: words, single digits, punctuation, line ends.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """A tokenizer.json of the `tokenizers` library. Raises DataError for one that cannot be read or has no
    `<|endoftext|>`, which closes every document.

    serialized: the file's text. vocab_size: 1 + the largest id, control tokens included.
    """

    def __init__(self, serialized: str, origin: str) -> None:
        self.serialized, self._origin = serialized, origin
        try:
            self._full, self._text_only, self._vocabulary = _parse(serialized)
        except Exception as error:  # the library raises Exception itself
            what = "is not a tokenizer.json that the tokenizers library can read"
            raise DataError(f"{origin} {what} ({error})") from error
        self.end_of_text = self.control_id(END_OF_TEXT)
        self.vocab_size = max(self._vocabulary.values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any control token."""
        return self._text_only.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, on all the threads that RAYON_NUM_THREADS allows."""
        return [found.ids for found in self._text_only.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_marked(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text in which the names of control tokens are these tokens, as transformers reads it.

        Only for texts of benchmarks and rendered conversations. add_special_tokens: what the tokenizer.json
        puts around a text (Qwen's: nothing).
        """
        return self._full.encode(text, add_special_tokens=add_special_tokens).ids

    def control_id(self, name: str) -> int:
        """Id of a control token. Raises DataError for a tokenizer without it."""
        if name not in self._vocabulary:
            raise DataError(f"{self._origin} has no token {name}; use one with the control tokens of Qwen3")
        return self._vocabulary[name]

    def vocabulary(self) -> dict[str, int]:
        return self._vocabulary

    def decode(self, ids: list[int], *, control: bool = True) -> str:
        """Text of ids; control tokens appear as their names, or are left out if they are special tokens."""
        return self._full.decode(ids, skip_special_tokens=not control)


@functools.lru_cache(maxsize=2)  # parsing takes a second, and one tokenizer is loaded several times
def _parse(serialized: str) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer, dict[str, int]]:
    """The tokenizer with added tokens, the one without (control strings stay text), and all ids."""
    full = tokenizers.Tokenizer.from_str(serialized)
    full.no_truncation()
    full.no_padding()
    bare: dict[str, Any] = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    text_only = tokenizers.Tokenizer.from_str(json.dumps(json.loads(serialized) | bare))
    return full, text_only, full.get_vocab(with_added_tokens=True)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a prepared or Hugging Face folder. Raises DataError if it has none."""
    path = Path(folder) / "tokenizer.json"
    try:
        return Tokenizer(_text_of(path), str(path))
    except OSError as error:
        remedy = "name a folder that holds a tokenizer"
        raise DataError(f"{path} cannot be read ({error.strerror}); {remedy}") from error


def _text_of(path: Path) -> str:
    """Bytes that are not UTF-8 become surrogates, which the library refuses like any other damage."""
    return path.read_bytes().decode(errors="surrogateescape")


def tokenizer_of(config: DataConfig) -> Tokenizer:
    """The tokenizer that a run reads its data with."""
    if config.mode == "prepared":
        return load_tokenizer(config.dir)
    assert config.tokenizer is not None
    return fetch_tokenizer(config.tokenizer)


def check_vocab_size(ids: int, vocab_size: int) -> None:
    """Raise DataError if a tokenizer of `ids` ids has more ids than a model of `vocab_size`."""
    if ids > vocab_size:
        law = f"is smaller than the tokenizer of the data, which has {ids} ids"
        remedy = "raise model.vocab_size to at least that number, or use another tokenizer"
        raise DataError(f"model.vocab_size={vocab_size} {law}; {remedy}")


def fetch_tokenizer(name: str) -> Tokenizer:
    """A tokenizer from a folder, a tokenizer.json, or by its name on the Hugging Face hub."""
    path = Path(name, "tokenizer.json") if Path(name).is_dir() else Path(name)
    if path.is_file():
        return Tokenizer(_text_of(path), name)
    try:
        serialized = tokenizers.Tokenizer.from_pretrained(name).to_str()
    except Exception as error:  # the library raises Exception itself
        what = "is not a folder with a tokenizer.json, not such a file, and cannot be loaded from the hub"
        raise DataError(f"data.tokenizer={name} {what} ({error})") from error
    return Tokenizer(serialized, name)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """A byte-level BPE of at most `vocab_size` ids (fewer for little text), as tokenizer.json text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control, alphabet = list(CONTROL_TOKENS), as_bytes.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=control, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True)
