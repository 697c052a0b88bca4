"""The run folder: written once, then the only input of a rank. Torch-free."""

import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data_pipeline.config import CHAT_TEMPLATES, read_template
from data_pipeline.manifest import to_json, write_atomically
from moe.config import ConfigError
from trainer.settings.hub import fetch, is_hub_name
from trainer.settings.secrets import redacted
from trainer.settings.typed import literal

ROOT = Path(__file__).parents[2]
MANIFEST = "manifest.json"
TEMPLATE = "chat_template.jinja"  # the run's copy of a template that is a file of the user's
NAMES = "step-" + 8 * "[0-9]"  # of checkpoints; any other folder, such as a copy, is the user's


def freeze(run_dir: Path, cfg: DictConfig, overrides: list[str]) -> None:
    """Write config.yaml, overrides.txt, environment.json and git.txt of a new run; the texts hide secrets.

    A chat template that is a file is copied, because the run must go on without it.

    A folder that already holds the same configuration is not changed (the run continues). A folder with a
    different configuration raises ConfigError with the keys that differ.
    """
    frozen = run_dir / "config.yaml"
    if frozen.exists():
        old, new = flat(read_frozen(frozen)), flat(cfg)
        differing = [
            f"  {key}: folder {old.get(key, 'absent')}, now {new.get(key, 'absent')}"
            for key in {**old, **new}
            if old.get(key) != new.get(key)
        ]
        if differing:
            what = f"{run_dir} holds another run; choose another name=... or delete it. Keys that differ:"
            raise ConfigError([what, *differing])
        return
    try:
        given = redacted("".join(f"{line}\n" for line in overrides))
        (run_dir / "overrides.txt").write_text(given, errors="backslashreplace")
        (run_dir / "environment.json").write_text(json.dumps(_environment(), indent=1))
        commit, changes = git("rev-parse", "--verify", "HEAD"), git("diff", "HEAD")
        (run_dir / "git.txt").write_text(redacted(f"{commit}\n{changes}"))
        if (template := cfg.data.chat_template) not in CHAT_TEMPLATES:
            (run_dir / TEMPLATE).write_bytes(read_template(template).encode())
        write_atomically(frozen, OmegaConf.to_yaml(cfg, resolve=True).encode())
    except OSError as error:
        raise ConfigError(f"output_dir: cannot write the run folder {run_dir} ({error.strerror})") from error


def read_frozen(path: Path) -> Any:
    """Load a configuration from a frozen YAML file. Raises ConfigError if it cannot be read.

    Its ${...} are plain text: nothing in it reads the environment of whoever opens the folder.
    """
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(found, dict):
            raise YAMLError("it holds no keys")
        return OmegaConf.create(literal(found))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        remedy = "restore it, or start a run with another name"
        raise ConfigError(f"{path} cannot be read ({error}); {remedy}") from error


def read_run(run_dir: Path) -> Any:
    """The configuration with which a run continues: config.yaml, then the sections of each resume-K.yaml.

    Raises ConfigError for a folder that is not a run folder.
    """
    frozen = run_dir / "config.yaml"
    if not frozen.is_file():
        raise ConfigError(f"{run_dir} is not a run folder: it holds no config.yaml")
    cfg = read_frozen(frozen)
    changes = {path.stem.partition("-")[2]: path for path in run_dir.glob("resume-*.yaml")}
    for path in (changes[number] for number in sorted(filter(str.isdecimal, changes), key=int)):
        for section, value in read_frozen(path).items():
            cfg[section] = value
    if absent := [key for key in ("stage", "init") if not isinstance(cfg.get(key), DictConfig)]:
        raise ConfigError(f"{frozen} is not the configuration of a run: it has no {' and no '.join(absent)}")
    if (template := run_dir / TEMPLATE).is_file() and isinstance(cfg.get("data"), DictConfig):
        cfg.data.chat_template = str(template.absolute())
    forget_origin(cfg, run_dir)
    return cfg


def forget_origin(config: Any, run_dir: Path) -> None:
    """Once a run has a checkpoint, clear the source of its initial weights, whose folder may be gone."""
    with suppress(OSError):  # such as a name that is too long, which is refused where it is written
        if latest_checkpoint(run_dir) is not None:
            config.stage.init_from, config.init.upcycle = None, "none"


def lock(run_dir: Path) -> int:
    """Lock the run folder; the lock lasts as long as the returned descriptor or an inherited copy is open.

    Raises ConfigError if the folder is locked already or cannot be written. Warns if the file system has no
    locks.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        what = f"output_dir: cannot write the run folder {run_dir} ({error.strerror})"
        raise ConfigError(f"{what}; choose another") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigError(f"{run_dir} is running already; stop it first, or choose another name") from error
    except OSError as error:  # for example Lustre without its option flock
        why = f"its file system has no locks ({error.strerror})"
        print(f"warning: {run_dir} may be running already: {why}; make sure it is not", file=sys.stderr)
    return descriptor


def write_manifest(checkpoint: Path, fields: dict[str, Any]) -> None:
    """Write the manifest, the last file of a checkpoint: `fields` and their checksum.

    Fields: step, tokens, next_row (of the data), attempt; layout, for people; files: path -> its `measure`.
    """
    write_atomically(checkpoint / MANIFEST, to_json({**fields, "crc32": zlib.crc32(to_json(fields))}))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """What `write_manifest` wrote. Raises ValueError if it is missing or damaged."""
    try:
        fields = json.loads((checkpoint / MANIFEST).read_bytes())
        is_whole = fields.pop("crc32") == zlib.crc32(to_json(fields))
        files = fields.get("files", {})
        wrong = [name for name, entry in files.items() if len(entry) != 2 or not is_inside(name)]
        if is_whole and not wrong:
            return fields
        reason = f"{wrong[0]!r} is no file of a checkpoint" if is_whole else "its checksum differs"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error)
    raise ValueError(f"{MANIFEST} cannot be read ({reason})")


def is_inside(name: str) -> bool:
    """Whether a relative path stays in the folder that it is taken from."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def pasted(path: Path) -> str:
    """A path in a command that is printed: quoted for a shell, and never taken for an option."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run: first the one that the file `latest` names, then the others, newest first."""
    found, latest = sorted((run_dir / "checkpoints").glob(NAMES), reverse=True), ""
    with suppress(OSError):
        latest = (run_dir / "latest").read_text().strip()
    return sorted(found, key=lambda path: path.name != latest)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The first of `checkpoints` with a valid manifest: a run continues from it. None if there is none."""
    for path in checkpoints(run_dir):
        with suppress(ValueError):
            read_manifest(path)
            return path
    return None


def hf_folder(source: Path) -> Path:
    """The Hugging Face folder of a run folder (its newest checkpoint) or of a checkpoint, or `source` itself.

    A model of the hub is fetched. Raises ConfigError for a run that has no checkpoint yet, and for a model
    that the hub does not give.
    """
    if is_hub_name(str(source)):
        return fetch(str(source))
    if (source / "config.yaml").is_file():
        newest = latest_checkpoint(source)
        if newest is None:
            raise ConfigError(f"{source} has no checkpoint yet; train it first")
        source = newest
    return source / "hf" if (source / "hf").is_dir() else source


def run_of(source: Path) -> Path:
    """The run folder around the checkpoint `source`; any other `source` itself."""
    around = source.resolve().parent
    is_run = (source / "config.yaml").is_file()
    return around.parent if around.name == "checkpoints" and not is_run else source


def read_state(run_dir: Path) -> dict[str, Any]:
    """`{"state": running|stopped|finished|failed, "attempt": int}`; attempt 0 before the first start."""
    path = run_dir / "state"
    try:
        if not path.exists():
            return {"state": "new", "attempt": 0}
        found = json.loads(path.read_text())
        return {"state": str(found["state"]), "attempt": int(found["attempt"])}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        remedy = "delete it, attempts count from 1 again"
        raise ConfigError(f"{path} cannot be read ({error}); {remedy}") from error


def write_state(run_dir: Path, state: str, attempt: int) -> None:
    """Replace the state of a run, unless a later attempt has taken over."""
    if read_state(run_dir)["attempt"] <= attempt:
        write_atomically(run_dir / "state", to_json({"state": state, "attempt": attempt}))


def record_attempt(run_dir: Path, attempt: int, facts: dict[str, Any]) -> None:
    """Add the hardware of an attempt to environment.json: {"attempts": {"1": facts, ...}}. Rank 0 only."""
    path = run_dir / "environment.json"
    environment: dict[str, Any] = {}
    with suppress(OSError, ValueError, RecursionError):  # missing or damaged: only people read this file
        environment = json.loads(path.read_text())
    environment.setdefault("attempts", {})[str(attempt)] = facts
    write_atomically(path, json.dumps(environment, indent=1).encode())


def flat(cfg: Any) -> dict[str, Any]:
    """A configuration as {"optimizer.lr": 0.1, ...}; lists stay whole."""
    return dict(_leaves(OmegaConf.to_container(cfg, resolve=True), dict, "."))


def flat_metrics(values: Any) -> Iterator[tuple[str, Any]]:
    """{"layers": {"z_loss": [0.1]}} -> ("layers/z_loss/0", 0.1)"""
    return _leaves(values, (dict, list), "/")


def _leaves(values: Any, containers: Any, separator: str, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(values, containers) or not values:
        yield path, values
        return
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield from _leaves(value, containers, separator, f"{path}{separator}{key}" if path else str(key))


def _environment() -> dict[str, Any]:
    packages = dict(sorted((package.name, package.version) for package in distributions()))
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": packages}


def git(*command: str, root: Path = ROOT) -> str:
    """The output of git in `root`; empty outside a git checkout and without git."""
    with suppress(FileNotFoundError):
        done = subprocess.run(["git", *command], cwd=root, capture_output=True, check=False)
        return done.stdout.decode(errors="replace")  # a diff holds the bytes of files, in any encoding
    return ""
