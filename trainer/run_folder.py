"""The run folder: frozen once, then the one thing a rank needs to know. Torch-free."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_pipeline.manifest import to_json, write_atomically
from trainer.config import ConfigError

_PACKAGES = ("torch", "deepspeed", "datasets", "hydra-core", "numpy", "safetensors", "tokenizers", "wandb")


def freeze(run_dir: Path, cfg: DictConfig, overrides: list[str]) -> None:
    """Write config.yaml, overrides.txt, environment.json and git.txt of a new run.

    A folder that holds the same configuration already is left as it is (the run goes on); one that holds
    another raises ConfigError with the keys that differ.
    """
    frozen = run_dir / "config.yaml"
    if frozen.exists():
        old, new = _flat(OmegaConf.load(frozen)), _flat(cfg)
        differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if differing:
            raise ConfigError(
                [
                    f"{run_dir} holds another run; choose another name=... or delete it. Keys that differ:",
                    *(
                        f"  {key}: folder {old.get(key, 'absent')}, now {new.get(key, 'absent')}"
                        for key in differing
                    ),
                ]
            )
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "overrides.txt").write_text("".join(f"{line}\n" for line in overrides))
        (run_dir / "environment.json").write_text(json.dumps(_environment(), indent=1))
        (run_dir / "git.txt").write_text(_git())
        write_atomically(frozen, OmegaConf.to_yaml(cfg, resolve=True).encode())
    except OSError as error:
        raise ConfigError(
            [f"output_dir: cannot write the run folder {run_dir} ({error.strerror})"]
        ) from error


def read_state(run_dir: Path) -> dict[str, Any]:
    """`{"state": running|stopped|finished|failed, "attempt": int}`; attempt 0 before the first start."""
    path = run_dir / "state"
    return json.loads(path.read_text()) if path.exists() else {"state": "new", "attempt": 0}


def write_state(run_dir: Path, state: str, attempt: int) -> None:
    """Replace the state of a run."""
    write_atomically(run_dir / "state", to_json({"state": state, "attempt": attempt}))


def _flat(cfg: Any) -> dict[str, Any]:
    """{"optimizer.lr": 0.1, ...}"""
    values: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(value, f"{path}.{key}" if path else str(key))
        else:
            values[path] = node

    walk(OmegaConf.to_container(cfg, resolve=True), "")
    return values


def _environment() -> dict[str, Any]:
    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": packages}


def _git() -> str:
    """Commit and uncommitted changes of the code that runs, empty outside a git checkout."""
    here = Path(__file__).parent
    parts = []
    for command in (["git", "rev-parse", "HEAD"], ["git", "diff", "HEAD"]):
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
        parts.append(done.stdout if done.returncode == 0 else "")
    return "\n".join(parts)
