"""What lm-eval asks of a model, answered by ours; texts become tokens as in lm-eval's own `hf` model."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.permutation import derive_key
from data_pipeline.templated import Qwen3
from data_pipeline.tokenizer import END_OF_TEXT, Tokenizer
from moe.config import ConfigError
from moe.next_token import SamplingSettings
from moe.sampling import Request
from trainer.stages.orders import Orders, Writing

_SEED = 1234  # of completions that are drawn
_MAX_NEW_TOKENS = 256  # lm-eval's, if a task says nothing
# what a task may say of generation; other keys only with the value that changes nothing
_UNDERSTOOD = {"until", "do_sample", "temperature", "top_p", "top_k", "max_gen_toks"}
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True, "num_return_sequences": 1}


class Reader(NamedTuple):
    """How the texts of benchmarks become tokens."""

    tokenizer: Tokenizer
    prefix: str  # the token before a text without a context
    end: str  # the token that ends a text
    max_length: int  # tokens that the model can read
    template: Qwen3 | None = None  # questions are the message of a user

    @classmethod
    def of_folder(cls, folder: Path, tokenizer: Tokenizer, max_length: int) -> "Reader":
        """With the tokens that transformers takes from a tokenizer_config.json, if there is one.

        Raises ConfigError for one that cannot be read.
        """
        path, of = folder / "tokenizer_config.json", dict[str, Any]()
        try:
            if path.is_file():
                found = json.loads(path.read_bytes())
                of = {key: found.get(key) for key in ("bos_token", "eos_token")}
                of = {
                    key: token["content"] if isinstance(token, dict) else token for key, token in of.items()
                }
        except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read ({error!r}); correct it, or remove it") from error
        end = of.get("eos_token") or END_OF_TEXT
        prefix = of.get("bos_token") or end
        for name in (prefix, end):
            tokenizer.control_id(name)  # raises for a tokenizer without it
        return cls(tokenizer, prefix, end, max_length)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion."""
        known = self.tokenizer.vocabulary()
        names = dict.fromkeys((END_OF_TEXT, "<|im_end|>", self.end))
        return tuple(known[name] for name in names if name in known)


class Asked:
    """The methods of lm-eval's TemplateLM for our model; it does the rest."""

    tokenizer_name = "ours"
    loglikelihood: Callable[..., Any]

    def __init__(self, reader: Reader, orders: Orders) -> None:
        super().__init__()
        self._reader, self._orders = reader, orders
        self._encode = lru_cache(64)(reader.tokenizer.encode_marked)  # the choices of a question share it

    @property
    def eot_token_id(self) -> int:
        return self._reader.tokenizer.control_id(self._reader.end)

    @property
    def prefix_token_id(self) -> int:
        return self._reader.tokenizer.control_id(self._reader.prefix)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._reader.prefix)
        return list(self._encode(string, add_special_tokens))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        pairs, room = [], self._reader.max_length + 1  # the last token is not read
        for _text, context, continuation in requests:
            if len(continuation) >= room:
                law = f"has {len(continuation)} tokens, but the model reads {room - 1} at most"
                raise ConfigError(f"a continuation that is to be scored {law}; leave this task out")
            before = (context or [self.prefix_token_id])[-(room - len(continuation)) :]
            pairs.append((before, continuation))
        return self._orders.score(pairs)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = [], []
        for number, request in enumerate(requests):
            of_text = {"token_list": self.tok_encode(request.args[0]), "prefix_token": self.prefix_token_id}
            for window in get_rolling_token_windows(
                **of_text, max_seq_len=self._reader.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += log_prob
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        from lm_eval.models.utils import postprocess_generated_text

        texts = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        for numbers in alike.values():
            settings, until = _generation(requests[numbers[0]].args[1], self._reader)
            room = self._reader.max_length - settings.max_new_tokens
            some = []
            for number in numbers:
                ids = self.tok_encode(requests[number].args[0])[-room:] or [self.prefix_token_id]
                some.append(Request(derive_key(_SEED, number), ids))
            for number, tokens in zip(
                numbers, self._orders.write(Writing(some, settings, until)), strict=True
            ):
                text = self._reader.tokenizer.decode(tokens, control=False)
                texts[number] = postprocess_generated_text(text, until, None)
        return texts

    def apply_chat_template(self, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        assert self._reader.template is not None
        begun = "" if add_generation_prompt else history[-1]["content"]
        asked = history if add_generation_prompt else history[:-1]
        pieces = self._reader.template.prompt({"messages": asked}, None)
        return "".join(piece.text or piece.control or "" for piece in pieces) + begun


def _generation(options: dict[str, Any], reader: Reader) -> tuple[SamplingSettings, list[str]]:
    """How a task wants its completions, and at what texts they end."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    of: Any = normalize_gen_kwargs(options, _MAX_NEW_TOKENS)
    until = handle_stop_sequences(of["until"], eos=reader.end)
    temperature = of.get("temperature", 1.0) if of["do_sample"] else 0.0
    top = of.get("top_p") or 1.0, of.get("top_k") or 0
    settings = SamplingSettings(float(temperature), *top, 0, of["max_gen_toks"], reader.stop_ids)
    return settings, [stop for stop in until if stop]


def generation_problems(options: dict[str, Any], max_length: int) -> Iterator[str]:
    """Why a model that reads so many tokens cannot generate as a task wants."""
    from lm_eval.models.utils import normalize_gen_kwargs

    of: Any = normalize_gen_kwargs(options, _MAX_NEW_TOKENS)
    if of["max_gen_toks"] >= max_length:
        law = f"max_gen_toks={of['max_gen_toks']} leaves no room for a question"
        yield f"{law}; the model reads {max_length} tokens at most; lower it in the task"
    for key in sorted(of.keys() - _UNDERSTOOD):
        if of[key] is not None and of[key] != _NEUTRAL.get(key):
            yield f"generation_kwargs.{key}={of[key]} is not supported; remove it from the task"
