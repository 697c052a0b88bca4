"""Prepare the data of a run, check a prepared folder, or print rows as the model sees them.

  python -m data_pipeline experiment=demo                  text -> token shards; what is done already is kept
  python -m data_pipeline verify data/embedded             read every byte of a prepared folder
  python -m data_pipeline inspect 0 experiment=demo        show a row: ROW, SOURCE or SOURCE:ROW
  python -m data_pipeline look FILES [data.tokenizer=NAME] what files hold, and how a run reads them

Give the same experiment and keys as to python -m trainer. --cfg job prints the composed configuration.
docs/data.md explains the keys of data.
"""

import itertools
import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.console import Console

from data_pipeline.config import DataConfig, DataError
from data_pipeline.files import find
from data_pipeline.look import look
from data_pipeline.packing import NO_LOSS, make_plans
from data_pipeline.prepare import prepare
from data_pipeline.prompts import Prompts
from data_pipeline.shards import verify
from data_pipeline.tokenizer import fetch_tokenizer, load_tokenizer
from moe.config import ConfigError
from trainer.settings.command import compose_and
from trainer.settings.config import RunConfig


def prepare_here(cfg: DictConfig) -> int:
    """Read the sources and write token shards; work that is already done is kept."""
    config = RunConfig.load(cfg)
    if problems := [*config.model.problems(), *config.data.problems()]:
        raise ConfigError(problems)
    prepare(config.data, config.model.vocab_size, config.seed)
    make_plans(config.data, config.stage.seq_len)
    same = shlex.quote(f"data.dir={config.data.dir}")
    print(f"Next: python -m trainer experiment=... with the same data ({same})")
    return 0


def verify_here(folder: str) -> int:
    """Read every byte of a prepared folder; print its number of tokens, or the damage."""
    try:
        shards = verify(Path(folder)).shards()
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{folder} is undamaged: {sum(shard.tokens for shard in shards):,} tokens in {len(shards)} shards")
    return 0


def look_here(patterns: list[str], config: DataConfig) -> int:
    """Print what the files hold; a file that cannot be read does not hide the others."""
    tokenizer = None if config.tokenizer is None else fetch_tokenizer(config.tokenizer)
    console, code = Console(highlight=False, soft_wrap=True), 0
    for pattern in patterns:
        try:
            if not (paths := find(pattern)):
                raise DataError(f"{pattern} matches no file; for a folder use folder/**/*.EXT")
        except DataError as error:
            paths, code = [], 2
            print(error, file=sys.stderr)
        for path in paths:
            try:
                for text in look(path, config, tokenizer, console.is_terminal):
                    console.print(text, end="")
            except DataError as error:
                code = 2
                print(f"{error}\n", file=sys.stderr)
    return code


def show(config: DataConfig, which: str, *, seq_len: int, seed: int) -> str:
    """One row as the model sees it: decoded, with the borders and origins of its documents.

    which: ROW, a global row number of the run; or SOURCE or SOURCE:ROW, a training row of one source, without
    shuffling. A row of a source of prompts is one prompt, shown with its fields. Raises DataError if the
    prepared folder has no such row.
    """
    from data_pipeline.loader import Loader  # imports torch, which workers do not need

    source, _, number = which.partition(":") if not which.isdecimal() else ("", "", which)
    if (source and source not in config.sources) or not (number or "0").isdecimal():
        known = ", ".join(config.sources)
        raise DataError(f"{which} is not a row; give ROW, SOURCE or SOURCE:ROW, with SOURCE of {known}")
    if config.mode == "streaming":
        raise DataError("data.mode=streaming: only rows of a prepared folder can be shown; prepare the data")
    names = {source} if source else config.trained_sources()
    if not names & set(config.text_sources()):
        return _show_prompt(config, source or None, int(number or 0), seed)
    shape: dict[str, Any] = {"global_batch_size": 1, "micro_batch_size": 1, "rank": 0, "world_size": 1}
    shape |= {"next_row": int(number or 0), "source": source or None}
    with Loader(config, seq_len=seq_len, seed=seed, **shape) as loader:
        batch = next((batch for [batch] in loader), None)
        if batch is None:
            raise DataError(f"{which}: there is no such row")
        loader.close()  # stop reading ahead: this thread now reads the files
        origins, tokenizer = loader.origins(batch.rows[0]), load_tokenizer(config.dir)
    tokens, has_label = batch.input_ids[0].numpy(), batch.labels[0].numpy() != NO_LOSS
    # the target of position t is token t+1, so the first token is not a target in this row
    learned, valid = np.append(False, has_label[:-1]), int(batch.token_mask.sum())
    lines = [f"row {batch.rows[0]}: {valid} tokens, {has_label.sum()} targets; [- not learned -]"]
    borders = [border for border in batch.cu_seqlens.tolist() if border <= valid]
    # a document whose first token is the last target has an origin but no input token
    for (start, stop), origin in zip(itertools.pairwise(borders), origins, strict=False):
        lines += [f"--- tokens {start} to {stop}: {origin}", ""]
        changes = np.flatnonzero(np.diff(learned[start:stop])) + start + 1
        for first, end in itertools.pairwise([start, *changes.tolist(), stop]):
            text = tokenizer.decode(tokens[first:end].tolist())
            lines[-1] += text if learned[first] else f"[-{text}-]"
    if valid < len(tokens):
        lines.append(f"--- tokens {valid} to {len(tokens)}: padding")
    return "\n".join(lines)


def _show_prompt(config: DataConfig, source: str | None, number: int, seed: int) -> str:
    with Prompts(config, seed=seed, source=source) as prompts:
        if number >= len(prompts):
            raise DataError(f"{source or 'the run'}: there is no such row as {number}")
        (row, _, ids, fields), origin = prompts[number], prompts.origin(number)
    head = f"prompt {row}: {len(ids)} tokens, none of them learned", f"--- {origin}"
    shown = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    return "\n".join([*head, load_tokenizer(config.dir).decode(ids), "--- fields", *shown])


_USAGE = {
    "verify": "verify FOLDER",
    "inspect": "inspect ROW experiment=NAME; ROW is a number, SOURCE or SOURCE:NUMBER",
    "look": "look FILES [data.tokenizer=NAME]",
}


def _patterns(arguments: list[str]) -> list[str]:
    """The files among the arguments of `look`; the others are settings."""
    return [path for path in arguments if "=" not in path or find(path)]


def _check_usage(word: str, others: list[str]) -> None:
    """Exit with 2 and the usage if `word` is no command, or lacks what it needs."""
    sound = {
        "verify": len(others) == 1,
        "inspect": bool(others) and "=" not in others[0],
        "look": word == "look" and bool(_patterns(others)),
    }
    if not sound.get(word):
        known = [_USAGE[word]] if word in _USAGE else ["KEY=VALUE ...", *_USAGE.values()]
        lines = "\n".join(f"  python -m data_pipeline {usage}" for usage in known)
        law = "needs other arguments" if word in _USAGE else "is neither a command nor KEY=VALUE"
        print(f"{word} {law}; use\n{lines}", file=sys.stderr)
        sys.exit(2)


def main(arguments: list[str]) -> None:
    """Run the command and exit with its exit code."""
    if {"--help", "-h"} & set(arguments):
        compose_and("prepare", __doc__, prepare_here)
    word = arguments[0] if arguments else "-"
    if "=" not in word and not word.startswith(("-", "~")):
        _check_usage(word, arguments[1:])
    if arguments[:1] == ["verify"]:
        sys.exit(verify_here(arguments[1]))
    if arguments[:1] == ["inspect"]:

        def inspect_here(cfg: DictConfig) -> int:
            config = RunConfig.load(cfg)
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `inspect ... | head`
            shown = show(config.data, arguments[1], seq_len=config.stage.seq_len, seed=config.seed)
            print(shown.encode(errors="backslashreplace").decode())  # names of files may be other bytes
            return 0

        sys.argv[1:] = arguments[2:]  # Hydra reads the other arguments
        compose_and("prepare", __doc__, inspect_here)
    if arguments[:1] == ["look"]:
        patterns = _patterns(arguments[1:])
        others = [path for path in arguments[1:] if path not in patterns]
        sys.argv[1:] = ["name=look", "data=jsonl", "data.dir=none", *others]
        compose_and("prepare", __doc__, lambda cfg: look_here(patterns, RunConfig.load(cfg).data))
    compose_and("prepare", __doc__, prepare_here)


if __name__ == "__main__":
    main(sys.argv[1:])
