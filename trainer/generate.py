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

from data_pipeline import chat, forms, readers
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
from trainer.ranks.launch import exit_with, launch
from trainer.ranks.runtime import DTYPES, Ranks
from trainer.settings.command import tells_mistakes
from trainer.settings.run_folder import hf_folder
from trainer.settings.typed import is_text

_SECONDS_BETWEEN_LINES = 5.0  # of progress
_ADDED = ("completion", "truncated", "number")  # the keys that --out adds to each row
_MARK = "\0"  # no argument of a program has it


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
        has_messages, is_text_prompt = row.get("messages") is not None, isinstance(row.get("prompt"), str)
        if not (has_messages or is_text_prompt or isinstance(row.get("prompt"), list)):
            raise DataError(f"{where} is no object with a text `prompt` or a list of messages; correct it")
        if not is_text(json.dumps(row, ensure_ascii=False)):
            raise ConfigError(f"{where} is not text in UTF-8; correct its bytes")
        if self.chat or not is_text_prompt or has_messages:
            form = "messages" if has_messages else "prompt_completion"
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
    ranks, rows = writer.ranks, _prompts(prompts)
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
    parts = [_part(out, rank) for rank in range(1, ranks.world_size)]
    ranks.from_main(lambda: _gather(out, parts))
    print(f"{out} holds the completions of {len(rows):,} prompts, {len(ids):,} of them new")


def _prompts(path: Path) -> dict[int, dict[str, Any]]:
    """The rows of a file by number: that of the line, from 0. As in sources, blank lines are no rows.

    Raises DataError for a line that is no object, or has a key that --out would overwrite.
    """
    part = readers.Part(0, str(path), 0, sys.maxsize, 0)  # to its end: a pipe does not tell its size
    rows = {}
    for row in readers.read_rows(SourceConfig("jsonl", [str(path)]), part):
        if row.fault == readers.BLANK:
            continue
        if row.fault is not None:
            raise DataError(f"{path}:{row.line} is not a JSON object ({row.fault}); correct it")
        if taken := [key for key in _ADDED if key in row.value]:
            law = f"has the keys {', '.join(taken)}, which --out adds to each row"
            raise DataError(f"{path}:{row.line} {law}; rename them in all rows")
        rows[row.line - 1] = row.value
    return rows


def _done_before(rows: dict[int, dict[str, Any]], prompts: Path, out: Path) -> set[int]:
    """The numbers of the rows in `out`, which takes over what the ranks of an earlier command left beside it.

    Raises DataError, and changes nothing, if one of these files is not this command's own.
    """
    try:
        if not out.parent.is_dir():
            raise DataError(f"--out {out}: there is no folder {out.parent}; make it, or name another one")
        left = [*out.parent.glob(f".{glob.escape(out.name)}.rank-*")]
        found = [out, *left] if out.exists() else left
        numbers = {number for path in found for number in _own(path, rows, prompts)}
        out.open("ab").close()  # what cannot be written is told before the work
    except OSError as error:
        raise DataError(f"--out {out} cannot be used ({error.strerror}); name another file") from error
    _gather(out, left)
    return numbers


def _own(path: Path, rows: dict[int, dict[str, Any]], prompts: Path) -> list[int]:
    """The numbers of the whole lines of a file; a kill may have torn the last line.

    Raises DataError if it holds anything that this command does not write for `rows`: that is a user's.
    """
    remedy = "it is left as it is; name another file for --out"
    if not path.is_file() or path.samefile(prompts):
        what = "the file of --prompts" if path.is_file() else "no regular file"
        raise DataError(f"{path} is {what}; {remedy}")
    *whole, last = path.read_bytes().split(b"\n")
    numbers = [_number(text, rows) for text in whole]
    if last and not _is_torn(last, rows):
        numbers.append(_number(last, rows))
    if -1 in numbers:
        where = f"{path}:{numbers.index(-1) + 1}"
        raise DataError(f"{where} is no completion of a row that {prompts} has; {remedy}")
    return numbers[: len(whole)]


def _number(text: bytes, rows: dict[int, dict[str, Any]]) -> int:
    """The number of a line that this command wrote for one of `rows`; -1 for any other text."""
    line = _parsed(text)
    number = line.get("number") if isinstance(line, dict) else None
    if not isinstance(number, int) or number not in rows:
        return -1
    own = rows[number] | {key: line.get(key) for key in _ADDED}
    return number if json.dumps(line) == json.dumps(own) else -1  # as texts, for NaN is not equal to NaN


def _is_torn(text: bytes, rows: dict[int, dict[str, Any]]) -> bool:
    """Whether a text is the begin of such a line, and no whole object, which would be another's."""
    lines = (json.dumps({**row, "completion": ""}, ensure_ascii=False) for row in rows.values())
    begins = (line.removesuffix('"}').encode() for line in lines)
    return _parsed(text) is None and any(text.startswith(own) or own.startswith(text) for own in begins)


def _parsed(text: bytes) -> Any:
    """What a text holds as JSON; None for another one."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _part(out: Path, rank: int) -> Path:
    """The file that a rank appends to."""
    return out.with_name(f".{out.name}.rank-{rank}") if rank else out


def _gather(out: Path, parts: list[Path]) -> None:
    """Append to `out` what ranks wrote beside it, after the last whole line of each."""
    for path in (out, *parts):
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)
    for path in sorted(parts):
        known = {json.loads(line)["number"] for line in out.read_bytes().splitlines()}  # before a kill
        lines = path.read_bytes().splitlines(keepends=True)
        with out.open("ab") as file:
            file.writelines(line for line in lines if json.loads(line)["number"] not in known)
        path.unlink()


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
    where = "run folder, checkpoint, or Hugging Face folder"
    parser.add_argument("source", type=lambda text: Path(text.lstrip(_MARK)), help=where)
    parser.add_argument("prompt", type=lambda text: text.lstrip(_MARK), nargs="?")
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
    end = arguments.index("--") if "--" in arguments else len(arguments)
    marked = [_MARK + word for word in arguments[end + 1 :]]  # argparse may take them for options
    options = parser.parse_intermixed_args([*arguments[:end], *marked])
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
    exit_with(main(sys.argv[1:]))
