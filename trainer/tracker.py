"""Where metrics go: JSON Lines files always, Weights & Biases online or offline, never in training's way."""

import json
import netrc
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO
from urllib.parse import urlparse

import numpy as np

from trainer.alarms import Alarm
from trainer.config import RunConfig
from trainer.metrics import HISTOGRAM_LOG2
from trainer.run_folder import flat_metrics

_ROOT = Path(__file__).parents[1]
_CODE = {".py", ".yaml", ".sh", ".html"}


class Tracker:
    """Metrics and alarms of one run folder; a context. Only the tracker of the main rank does anything.

    W&B gets each step once, in order, under one run id over all attempts: a step that is done again is the
    same bit for bit. Each attempt first tells it what it may not know: an offline file begins anew, so that
    the newest holds the whole run, and a killed client loses its last seconds. `say` tells a person.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, attempt: int, say: Callable[[str], None], is_main: bool
    ) -> None:
        self._attempt, self._say, self._is_main = attempt, say, is_main
        self._run: Any = None
        self._wandb = False
        self._files: dict[str, TextIO] = {}
        if not is_main:
            return
        for name in ("metrics", "expert_load", "alarms"):
            path = run_dir / f"{name}.jsonl"
            _drop_torn_line(path)
            self._files[name] = path.open("a", buffering=1)
        mode = _wandb_mode(config.tracker.wandb)
        self._wandb = mode != "disabled"
        self._guarded(lambda: self._start(mode, config, run_dir))

    def log(self, metrics: dict[str, Any]) -> None:
        """One line of metrics.jsonl and one point of W&B; `metrics` holds at least `step`."""
        if not self._is_main:
            return
        rest = dict(metrics)
        load = rest.pop("tokens_per_expert", None)
        self._write("metrics", rest)
        if load is not None:
            self._write("expert_load", {"step": metrics["step"], "tokens_per_expert": load})
        self._guarded(lambda: self._send(rest, load))

    def alert(self, step: int, alarm: Alarm) -> None:
        """Tell a person, alarms.jsonl and W&B."""
        self._say(f"ALARM {alarm.kind} at step {step}: {alarm.text}")
        if self._is_main:
            self._write("alarms", {"step": step, "kind": alarm.kind, "text": alarm.text})
            self._guarded(lambda: self._run.alert(f"{alarm.kind} at step {step}", alarm.text, level="WARN"))

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        self._guarded(lambda: self._run.finish(exit_code=1 if error else 0))

    def _write(self, name: str, values: dict[str, Any]) -> None:
        self._files[name].write(json.dumps({**values, "attempt": self._attempt}) + "\n")

    def _guarded(self, act: Callable[[], None]) -> None:
        """W&B is a guest: whatever goes wrong in its client ends its part, not the run's."""
        try:
            if self._wandb:
                act()
        except Exception as error:
            self._wandb = False
            self._say(f"warning: W&B has failed ({error}); metrics.jsonl goes on")

    def _start(self, mode: str, config: RunConfig, run_dir: Path) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # would wait for a dead server at exit
        os.environ.setdefault(
            "WANDB_DATA_DIR", str((run_dir / "wandb").resolve())
        )  # or ~ would hold our code
        import wandb

        parent = str(Path(config.name).parent)
        timeout = config.tracker.timeout_seconds
        settings = wandb.Settings(
            console="off", silent=True, init_timeout=timeout, login_timeout=timeout, finish_timeout=timeout
        )

        def init(mode: Any) -> Any:
            return wandb.init(
                mode=mode,
                dir=run_dir,
                id=_run_id(run_dir),
                resume="allow" if mode == "online" else None,
                project=os.environ.get("WANDB_PROJECT", config.tracker.project),  # which a W&B sweep sets
                group=config.tracker.group or (None if parent == "." else parent),
                tags=config.tracker.tags,
                name=config.name,
                config=asdict(config),
                settings=settings,
            )

        try:
            self._run = init(mode)
        except Exception as error:
            if mode != "online":
                raise
            later = f"upload later by wandb sync {run_dir}/wandb/latest-run"
            self._say(f"warning: W&B does not answer ({error}); going on offline, {later}")
            wandb.teardown()  # its service holds the run id
            self._run = init("offline")
        self._run.define_metric("*", step_metric="step")  # `tokens` is there for the other axis
        for key in ("loss", "loss/validation"):
            self._run.define_metric(key, step_metric="step", summary="min,last")
        code = wandb.Artifact(f"code-{self._run.id}", type="code")
        for folder in ("trainer", "moe", "data_pipeline", "slurm", "conf"):
            for path in sorted((_ROOT / folder).rglob("*")):
                if path.suffix in _CODE:
                    code.add_file(str(path), str(path.relative_to(_ROOT)))
        for name in ("config.yaml", "overrides.txt", "environment.json", "git.txt"):
            code.add_file(str(run_dir / name), f"run/{name}")
        self._run.log_artifact(code)
        self._told_step = self._run.step  # online, what the server has
        with (run_dir / "metrics.jsonl").open() as known, (run_dir / "expert_load.jsonl").open() as loads:
            load = {line["step"]: line["tokens_per_expert"] for line in map(json.loads, loads)}
            for line in map(json.loads, known):
                self._send(line, load.get(line["step"]) if "loss" in line else None)

    def _send(self, metrics: dict[str, Any], load: list[list[int]] | None) -> None:
        import wandb

        step, rest = metrics["step"], dict(metrics)
        if step < self._told_step:
            return
        self._told_step = step
        histograms = rest.pop("gradient_histogram", {})
        point = dict(flat_metrics(rest))
        if load is not None:
            point["expert_load"] = wandb.Image(
                heatmap(np.array(load)),
                caption=f"step {step}: layers down, experts across; red = twice the mean",
            )
        edges = np.exp2(np.arange(HISTOGRAM_LOG2[0], HISTOGRAM_LOG2[1] + 1))
        for kind, counts in histograms.items():
            point[f"gradient/{kind}"] = wandb.Histogram(np_histogram=(np.array(counts), edges))
        self._run.log(point, step=step)


def heatmap(load: np.ndarray) -> np.ndarray:
    """[L,E] tokens -> [8L,4E,3] uint8: white = the layer's mean, blue = nothing, red = twice the mean."""
    away = np.clip(load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9) - 1, -1, 1)
    colours = np.stack([1 + np.minimum(away, 0), 1 - abs(away), 1 - np.maximum(away, 0)], axis=-1)
    return (255 * colours).astype(np.uint8).repeat(8, axis=0).repeat(4, axis=1)


def _drop_torn_line(path: Path) -> None:
    """A killed attempt may have left half a line; what follows would be glued to it."""
    if path.exists():
        text = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)


def _wandb_mode(configured: str) -> str:
    """`auto` is online where a key is at hand, else offline; WANDB_MODE of the environment goes before it."""
    if configured != "auto":
        return configured
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    return "online" if "WANDB_API_KEY" in os.environ or _netrc_has_key() else "offline"


def _netrc_has_key() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def _run_id(run_dir: Path) -> str:
    """One W&B run per run folder, over all attempts; the agent of a W&B sweep chooses it."""
    path = run_dir / "wandb_id"
    if not path.exists():
        path.write_text(os.environ.get("WANDB_RUN_ID", os.urandom(6).hex()))
    return path.read_text()
