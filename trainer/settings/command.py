"""What the commands share: composing a configuration, checking a run, reporting mistakes. Torch-free."""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from importlib.resources import files
from itertools import chain
from pathlib import Path
from textwrap import fill
from typing import NoReturn, ParamSpec

import hydra
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.check import check_data
from data_pipeline.config import DataError
from data_pipeline.streaming import absolute_paths, absolute_template
from moe.config import ConfigError
from trainer.settings.config import RunConfig
from trainer.settings.hub import is_hub_name, pinned
from trainer.settings.run_folder import flat, forget_origin, hf_folder
from trainer.settings.secrets import redacted, unsafe_settings

P = ParamSpec("P")


def tells_mistakes(command: Callable[P, int | None], headline: str = "") -> Callable[P, int | None]:
    """Wrap `command`: if the configuration or the data is wrong, print the message alone and return 2."""

    @wraps(command)
    def telling(*args: P.args, **kwargs: P.kwargs) -> int | None:
        try:
            return command(*args, **kwargs)
        except (ConfigError, DataError) as error:
            if os.environ.get("LOCAL_RANK", "0") == "0":  # all ranks of a machine have the same error
                print(redacted(f"{headline}{error}"), file=sys.stderr)
            return 2

    return telling


def compose_and(
    config_name: str,
    about: str | None,
    act: Callable[[DictConfig], int],
    finish: Callable[[], int] = lambda: 0,
) -> NoReturn:
    """Compose `conf/<config_name>.yaml` with the command line and hand it to `act`; exits with its code.

    With -m, `act` gets every point of the sweep, and `finish` runs after the last one unless one failed. A
    wrong configuration exits with 2 and one message, whether Hydra or this project finds the mistake. --help
    prints `about`, the docstring of the command, and the groups.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `--help | head`
        print(_help(about or "", config_name))
        sys.exit(0)
    sys.argv[:] = in_words_of_hydra(sys.argv)
    composed, headline = False, "The configuration is wrong:\n"

    @hydra.main(version_base="1.3", config_path="pkg://conf", config_name=config_name)
    def entry(cfg: DictConfig) -> None:
        nonlocal composed
        composed = True
        if code := tells_mistakes(act, headline)(cfg):
            sys.exit(code)

    try:
        entry()
    except SystemExit as done:
        sys.exit(2 if done.code and not composed else done.code)
    except KeyboardInterrupt:
        print("interrupted before the run was started", file=sys.stderr)
        sys.exit(1)
    sys.exit(tells_mistakes(finish, headline)() if composed else 0)  # not composed, for example with --cfg


def in_words_of_hydra(arguments: Iterable[str]) -> list[str]:
    """The arguments of a command for Hydra. data.sources={...} replaces the sources: Hydra alone would merge
    the two, and refuse names that are new."""
    replaced = "data.sources"
    told = ([f"~{replaced}", f"+{of}"] if of.startswith(f"{replaced}={{") else [of] for of in arguments)
    return list(chain.from_iterable(told))


_PATHS = [("data", "dir"), ("stage", "init_from"), ("rl", "reference"), ("distill", "teacher")]
_PATHS += [("distill", "lessons")]
_READ_AGAIN = ("reference", "teacher")  # models that every start of a run reads


def _pinned(path: str, key: str) -> str:
    """A path or a name of the hub so that it means the same wherever and whenever the run is started."""
    if key in ("init_from", *_READ_AGAIN) and is_hub_name(path):
        return pinned(path)
    is_model = key in _READ_AGAIN and os.path.isdir(path)
    return str((hf_folder(Path(path)) if is_model else Path(path)).resolve())


def check(config: RunConfig, cfg: DictConfig) -> None:
    """Raises ConfigError or DataError if the run or its data is wrong.

    In `cfg`, from which `config` was loaded, paths that the run reads become absolute, and models that it
    reads at every start those of one checkpoint or commit: it may be started in another folder, and later.
    """
    forget_origin(config, config.run_dir)
    config.check()
    refuse_unsafe(cfg)
    check_data(config.data, config.model.vocab_size, config.seed)
    for group, key in _PATHS:
        if cfg.get(group) is not None and (path := cfg[group][key]) is not None:
            cfg[group][key] = _pinned(path, key)
    if (distill := type(config).load(cfg).distill) is not None:  # of a submission too
        distill.check_lessons(config.stage.seq_len)
    cfg.data.chat_template = absolute_template(config.data)
    if config.evaluate.benchmarks is not None:
        cfg.evaluate.benchmarks.update(config.evaluate.benchmarks.absolute())
    if config.data.mode == "streaming":
        cfg.data.merge_with(absolute_paths(config.data))


def refuse_unsafe(cfg: DictConfig) -> None:
    """Raises ConfigError if a setting holds a secret: `cfg` is stored, and must stay exact."""
    try:
        problems = unsafe_settings(flat(cfg))
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved ({error}); write the value out") from error
    if problems:
        raise ConfigError(problems)


def _help(about: str, config_name: str) -> str:
    """What a command does, then the groups of conf/ with their files, without those that begin with `_`."""
    lines = [about.strip(), "", "Groups; GROUP=NAME chooses a file:"]
    groups = (path for path in files("conf").iterdir() if path.is_dir())
    for group in sorted(groups, key=lambda path: path.name):
        names = sorted(path.name.removesuffix(".yaml") for path in group.iterdir())
        shown = ", ".join(name for name in names if name[0] != "_")
        if shown and (group.name not in ("slurm", "job") or config_name == "submit"):
            lines.append(fill(shown, 110, initial_indent=f"  {group.name:<12}", subsequent_indent=14 * " "))
    return "\n".join(lines)
