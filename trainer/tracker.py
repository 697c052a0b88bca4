"""Where metrics go: metrics.jsonl always, Weights & Biases online or offline."""

import json
import netrc
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.config import RunConfig


class Tracker:
    """Metrics of one run folder; only rank 0 makes one."""

    def __init__(self, config: RunConfig, run_dir: Path, attempt: int) -> None:
        self._attempt = attempt
        path = run_dir / "metrics.jsonl"
        _drop_torn_line(path)
        self._metrics = path.open("a", buffering=1)
        self._run: Any = None
        mode = _wandb_mode(config.tracker.wandb)
        if mode != "disabled":
            import wandb

            self._run = wandb.init(
                mode=mode,
                dir=run_dir,
                id=_run_id(run_dir),
                resume="allow" if mode == "online" else None,
                project=config.tracker.project,
                group=config.tracker.group,
                tags=config.tracker.tags,
                name=config.name.replace("/", "-"),
                config=asdict(config),
                settings=wandb.Settings(console="off", silent=True),
            )
            self._run.define_metric("*", step_metric="step")

    def log(self, metrics: dict[str, Any]) -> None:
        """One line of metrics.jsonl and one point of W&B; `metrics` holds at least `step`."""
        self._metrics.write(json.dumps({**metrics, "attempt": self._attempt}) + "\n")
        if self._run is not None:
            self._run.log(metrics)

    def close(self) -> None:
        """Flush and finish."""
        self._metrics.close()
        if self._run is not None:
            self._run.finish()


def _drop_torn_line(path: Path) -> None:
    """A killed attempt may have left half a line; what follows would be glued to it."""
    if path.exists():
        text = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)


def _wandb_mode(configured: str) -> Any:
    """`auto` is online where a key is at hand, else offline; WANDB_MODE of the environment goes before it."""
    if configured != "auto":
        return configured
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    return "online" if "WANDB_API_KEY" in os.environ or _netrc_has_key() else "offline"


def _netrc_has_key() -> bool:
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def _run_id(run_dir: Path) -> str:
    """One W&B run per run folder, over all attempts."""
    path = run_dir / "wandb_id"
    if not path.exists():
        path.write_text(os.urandom(6).hex())
    return path.read_text()
