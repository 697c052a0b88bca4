"""`python -m trainer.generate RUN_DIR "prompt"`: continue a prompt, or with --prompts FILE many at once.

--chat makes the prompt the message of a user; without a prompt, it talks with the person at the terminal.
"""

import argparse
import glob
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from data_pipeline import chat, forms
from data_pipeline.config import DataError, SourceConfig
from data_pipeline.permutation import derive_key
from data_pipeline.templated import Qwen3, template_of
from data_pipeline.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer
from moe.config import ConfigError
from moe.model import CausalLM
from moe.next_token import SamplingSettings
from moe.sampling import Request, Sample, sample
from trainer.checkpoints.weights import load_model, ranks_for, selection_bias
from trainer.engine.cpu_products import fast_products
from trainer.ranks.launch import launch
from trainer.ranks.runtime import DTYPES, Ranks
from trainer.settings.command import tells_mistakes
from trainer.settings.run_folder import hf_folder
from trainer.settings.typed import is_text

_SECONDS_BETWEEN_LINES = 5.0  # of progress


class Writer(NamedTuple):
    """A model with what it needs to continue texts."""

    model: CausalLM
    bias: Tensor | None
    tokenizer: Tokenizer
    settings: SamplingSettings
    seed: int
    rows: int  # samples at once
    chat: bool
    template: Callable[[], Qwen3]  # read when a conversation needs it
    thinks: bool
    ranks: Ranks  # all of them make the same calls

    def encode(self, row: dict[str, Any], where: str) -> list[int]:
        """The token ids of a row's `prompt`, or of its `messages` (and `tools`) by the chat template.

        Raises ConfigError or DataError, which name `where`, for a row that is no prompt or is too long.
        """
        if "messages" not in row and not isinstance(row.get("prompt"), str):
            raise DataError(f"{where} is no object with a text `prompt` or a list `messages`; correct it")
        if not is_text(json.dumps(row, ensure_ascii=False)):
            raise ConfigError(f"{where} is not text in UTF-8; correct its bytes")
        if "messages" in row or self.chat:
            form = "messages" if "messages" in row else "prompt_completion"
            try:
                asked = forms.read(row, SourceConfig("prompts", [], format=form)).row
                pieces = self.template().prompt(asked, row.get("enable_thinking", self.thinks))
                ids = chat.encode(pieces, self.tokenizer)[0].tolist()
            except (ValueError, KeyError) as error:
                raise DataError(f"{where}: {error}; correct it") from error
        else:
            ids = self.tokenizer.encode(row["prompt"])
        if not ids:
            raise ConfigError(f"{where} is empty; give at least one character")
        room = self.model.config.max_position_embeddings - len(ids)
        if self.settings.max_new_tokens > room:
            what = f"--tokens {self.settings.max_new_tokens} does not fit"
            raise ConfigError(f"{what}; the model has room for {room} after {where}")
        return ids

    def samples(
        self, prompts: dict[int, list[int]], done: Callable[[int, Sample], object], **more: Any
    ) -> None:
        """Continue this rank's share of prompts by number; what is random is that of seed and number."""
        numbers = list(prompts)[self.ranks.rank :: self.ranks.world_size]
        requests = [Request(derive_key(self.seed, number), prompts[number]) for number in numbers]
        parameter = self.model.lm_head.weight
        given = {"rows_at_once": self.rows, "device": parameter.device, "bias": self.bias, **more}
        given["anyone"] = self.ranks.any
        with fast_products(parameter.device, parameter.dtype):
            for place, found in sample(self.model, requests, self.settings, **given):
                done(numbers[place], found)

    def text(self, tokens: list[int]) -> str:
        """The text of new tokens, without the stop id."""
        return self.tokenizer.decode([token for token in tokens if token not in self.settings.stop_ids])

    def print_sample(self, row: dict[str, Any], number: int, where: str, before: str) -> str:
        """Print `before`, then the new text of a row while rank 0 samples it; returns it."""
        ids, shown = self.encode(row, where), before
        new: list[int] = []
        print(before, end="", flush=True)

        def show(_: int, token: int) -> None:
            nonlocal shown
            new.append(token)
            text = before + self.text(new)
            if not text.endswith("�"):  # wait for the rest of a character that spans tokens
                print(text[len(shown) :], end="", flush=True)
                shown = text

        self.samples({number: ids}, lambda *_: None, on_token=show)
        print()
        return self.ranks.from_main(lambda: self.text(new))


def write_all(writer: Writer, prompts: Path, out: Path) -> None:
    """Continue every row of a file of JSON lines; append each to `out` when its sample ends.

    Other ranks than the first append to files beside `out`, which it takes over at the end. Rows that are
    there already are not done again. Raises DataError for a file that cannot be used.
    """
    ranks, rows = writer.ranks, dict(enumerate(_read(prompts)))
    ids = {number: writer.encode(row, f"{prompts}:{number + 1}") for number, row in rows.items()}
    for number in ranks.from_main(lambda: _done_before(rows, prompts, out)):
        ids.pop(number, None)
    done, started = 0, time.monotonic()
    said, mine = started, len(ids) // ranks.world_size
    with _part(out, ranks.rank).open("a", encoding="utf-8") as file:

        def append(number: int, found: Sample) -> None:
            nonlocal done, said
            new = {"completion": writer.text(found.tokens), "truncated": found.truncated, "number": number}
            file.write(json.dumps({**rows[number], **new}, ensure_ascii=False) + "\n")
            file.flush()
            done += 1
            now = time.monotonic()
            if ranks.is_main and now - said > _SECONDS_BETWEEN_LINES:
                left = (now - started) / done * max(mine - done, 0)
                shown = min(done * ranks.world_size, len(ids))
                print(f"{shown:,} of {len(ids):,} prompts, {left:.0f} s left", file=sys.stderr)
                said = now

        writer.samples(ids, append)
    ranks.any(False)  # all files are written
    ranks.from_main(lambda: _gather(out, ranks.world_size))
    print(f"{out} holds the completions of {len(rows):,} prompts, {len(ids):,} of them new")


def _done_before(rows: dict[int, dict[str, Any]], prompts: Path, out: Path) -> list[int]:
    """The numbers of the rows in `out`, with what the ranks of an earlier command left beside it."""
    if not out.parent.is_dir():
        raise DataError(f"--out {out}: there is no folder {out.parent}; make it, or name another one")
    _gather(out)
    found = _read(out) if out.exists() else []
    for line in found:
        number = line.get("number", -1)
        if number not in rows or any(line.get(key) != value for key, value in rows[number].items()):
            raise DataError(f"{out} holds a row {number} that {prompts} has not; name another file for --out")
    return [line["number"] for line in found]


def _part(out: Path, rank: int) -> Path:
    """The file that a rank appends to."""
    return out.with_name(f".{out.name}.rank-{rank}") if rank else out


def _gather(out: Path, world_size: int = 1) -> None:
    """Append what ranks wrote beside `out`: those that are named, and all that are found there."""
    if out.exists():
        _cut_torn_line(out)
    found = {_part(out, rank) for rank in range(1, world_size)}
    for path in sorted({*found, *out.parent.glob(f".{glob.escape(out.name)}.rank-*")}):
        _cut_torn_line(path)
        known = {line.get("number") for line in _read(out)} if out.exists() else set()  # before a kill
        new = [line for line in _read(path) if line.get("number") not in known]
        with out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in new)
        path.unlink()


def _read(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises DataError, with the line, for anything else."""
    found = []
    try:
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            found.append(json.loads(line))
            if not isinstance(found[-1], dict):
                raise DataError(f"{path}:{number} is not a JSON object; correct it")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); name a file of JSON lines") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{len(found) + 1} is not JSON ({error}); correct it") from error
    return found


def _cut_torn_line(path: Path) -> None:
    """Remove a last line that was not written to its end."""
    text = path.read_bytes()
    os.truncate(path, text.rfind(b"\n") + 1)


def talk(writer: Writer) -> None:
    """Answer the person at the terminal, message after message, until the input ends."""

    def listen() -> str | None:
        try:
            return input("> ")
        except EOFError:
            return None

    messages: list[dict[str, str]] = []
    while (said := writer.ranks.from_main(listen)) is not None:
        messages.append({"role": "user", "content": said})
        answer = writer.print_sample({"messages": messages}, len(messages), "this conversation", "")
        messages.append({"role": "assistant", "content": answer.rpartition("</think>")[2].lstrip("\n")})
    print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.generate", description=__doc__)
    parser.add_argument("source", type=Path, help="run folder, checkpoint, or Hugging Face folder")
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--prompts", type=Path, help="JSON lines, each with `prompt` or `messages`")
    parser.add_argument(
        "--out", type=Path, help="JSON lines to append to; rows that it has are not done again"
    )
    parser.add_argument("--chat", action="store_true", help="the prompt is the message of a user")
    parser.add_argument("--no-thinking", action="store_true", help="with --chat: answer without reasoning")
    parser.add_argument("--tokens", type=int, default=120, help="maximum number of new tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="the fewest tokens with this probability")
    parser.add_argument("--top-k", type=int, default=0, help="the most probable tokens; 0 = all")
    parser.add_argument("--rows", type=int, default=64, help="samples at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nproc", type=int, default=1, help="ranks here, which share experts and prompts")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; the checkpoint's if not given")
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the command with a message if the options contradict their laws or each other."""
    if options.tokens < 1 or not 0 <= options.temperature < float("inf"):
        parser.error("--tokens must be above 0 and --temperature a finite number, 0 or more")
    if not 0 < options.top_p <= 1 or options.top_k < 0 or min(options.rows, options.nproc) < 1:
        parser.error("--top-p must be above 0 and at most 1, --top-k 0 or more, --rows and --nproc above 0")
    if (options.prompts is None) != (options.out is None):
        parser.error("--prompts and --out belong together: give both")
    talks = options.chat and sys.stdin.isatty()
    if (options.prompt is None) == (options.prompts is None) and (options.prompt or not talks):
        parser.error("give a prompt, or --prompts, or at a terminal --chat")


@tells_mistakes
def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    if options.nproc > 1 and "RANK" not in os.environ:
        return launch(["trainer.generate", *arguments], options.nproc, "auto")
    ranks = ranks_for(options.source)
    folder = ranks.from_main(lambda: hf_folder(options.source))
    tokenizer = load_tokenizer(folder)
    known = tokenizer.vocabulary()
    stops = tuple(known[name] for name in (END_OF_TEXT, "<|im_end|>") if name in known)
    settings = SamplingSettings(options.temperature, options.top_p, options.top_k, 0, options.tokens, stops)
    model = load_model(folder, ranks, DTYPES.get(options.dtype))
    thinks = not options.no_thinking
    of_model = (model, selection_bias(folder, ranks.device), tokenizer)
    of_text = (options.chat, lambda: template_of(folder), thinks)
    writer = Writer(*of_model, settings, options.seed, options.rows, *of_text, ranks)
    if options.prompts is not None:
        write_all(writer, options.prompts, options.out)
    elif options.prompt is None:
        talk(writer)
    else:
        before = "" if options.chat else options.prompt
        writer.print_sample({"prompt": options.prompt}, 0, "the prompt", before)
    ranks.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
