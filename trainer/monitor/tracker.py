"""Write metrics to JSON Lines files and to Weights & Biases; errors of W&B never stop a run."""

import json
import netrc
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO
from urllib.parse import urlparse

import numpy as np

from data_pipeline.manifest import write_atomically
from trainer.monitor.alarms import Alarm
from trainer.monitor.metrics import HISTOGRAM_LOG2
from trainer.settings.config import RunConfig
from trainer.settings.run_folder import ROOT, flat_metrics, pasted
from trainer.settings.secrets import is_secret_name, redacted, without_secrets

SAMPLE = ("prompt", "completion", "reward", "reasons", "source", "row")  # columns of a table of completions
_CODE = {".py", ".yaml", ".sh", ".html"}


class Tracker:
    """Writes metrics and alarms of one run; a context manager. Does nothing except on the main rank.

    W&B gets each step once, in order, under one run id for all attempts: a repeated step has the same values
    bit for bit. Each attempt first sends the earlier metrics that W&B may lack: a killed client loses its
    last seconds, and a new offline file has to hold the whole run. `say` prints to the terminal.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, attempt: int, say: Callable[[str], None], is_main: bool
    ) -> None:
        names = ("metrics", "expert_load", "alarms", *(["samples"] if config.rl else [])) if is_main else ()
        self._files = {name: _open(run_dir / f"{name}.jsonl") for name in names}
        self._attempt, self._say = attempt, say
        self._run: Any = None
        mode = _wandb_mode(config.tracker.wandb)
        self._wandb = is_main and mode != "disabled"
        self._guarded(lambda: self._start(mode, config, run_dir))

    def log(self, metrics: dict[str, Any]) -> None:
        """Write a line to metrics.jsonl, and a point to W&B; `metrics` holds at least `step`."""
        rest = dict(metrics)
        load = rest.pop("tokens_per_expert", None)
        for sample in rest.pop("samples", ()):
            self._write("samples", {"step": metrics["step"], **sample})
        self._write("metrics", rest)
        if load is not None:
            self._write("expert_load", {"step": metrics["step"], "tokens_per_expert": load})
        self._guarded(lambda: self._send(metrics))

    def alert(self, step: int, alarm: Alarm) -> None:
        """Send an alarm to the terminal, alarms.jsonl and W&B."""
        title = f"{alarm.kind} at step {step}"
        self._say(f"ALARM {title}: {alarm.text}")
        self._write("alarms", {"step": step, **alarm._asdict()})
        self._guarded(lambda: self._run.alert(title, alarm.text, level="WARN"))

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        self._guarded(lambda: self._run.finish(exit_code=1 if error else 0))

    def _write(self, name: str, values: dict[str, Any]) -> None:
        if name in self._files:
            self._files[name].write(json.dumps({**values, "attempt": self._attempt}) + "\n")

    def _guarded(self, act: Callable[[], None]) -> None:
        """Use W&B: after any error in its client the run continues without it."""
        try:
            if self._wandb:
                act()
        except Exception as error:
            self._wandb = False
            self._say(f"warning: W&B has failed ({error}); metrics are still written to metrics.jsonl")

    def _start(self, mode: Any, config: RunConfig, run_dir: Path) -> None:
        # Else W&B waits at exit for a server that does not answer, and copies our code to the home directory.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_DATA_DIR", str((run_dir / "wandb").resolve()))
        for name in list(os.environ):  # W&B records all variables of SLURM
            if name.startswith("SLURM_") and is_secret_name(name):
                del os.environ[name]
        import wandb

        identity = run_dir / "wandb_id"  # one for all attempts; a W&B sweep's agent sets it
        if not identity.exists():
            write_atomically(identity, os.environ.get("WANDB_RUN_ID", os.urandom(6).hex()).encode())
        folder, seconds = Path(config.name).parent.as_posix(), config.tracker.timeout_seconds
        settings = dict.fromkeys(("init_timeout", "login_timeout", "finish_timeout"), seconds)
        init = partial(
            wandb.init,
            dir=run_dir,
            id=identity.read_text(),
            project=os.environ.get("WANDB_PROJECT", config.tracker.project),  # set by a W&B sweep
            group=config.tracker.group or (None if folder == "." else folder),
            tags=config.tracker.tags,
            name=config.name,
            config=without_secrets(asdict(config)),
            settings={"console": "off", "silent": True, "disable_git": True, "save_code": False, **settings},
        )
        try:
            self._run = init(mode=mode, resume="allow" if mode == "online" else None)
        except Exception as error:
            if mode != "online":
                raise
            later = f"upload later with wandb sync {pasted(run_dir / 'wandb/latest-run')}"
            self._say(f"warning: W&B does not answer ({error}); continuing offline, {later}")
            wandb.teardown()  # the service of W&B still holds the run id
            self._run = init(mode="offline")
        self._run.define_metric("*", step_metric="step")  # `tokens` may be chosen as the x axis
        for key in ("loss", "loss/validation"):
            self._run.define_metric(key, step_metric="step", summary="min,last")
        self._run.log_artifact(_code(f"code-{self._run.id}", run_dir))
        self._told_step = self._run.step  # online: the step that the server has reached
        with (run_dir / "metrics.jsonl").open() as known, (run_dir / "expert_load.jsonl").open() as loads:
            load = {line["step"]: line for line in map(json.loads, loads)}
            for line in map(json.loads, known):
                self._send(load.get(line["step"], {}) | line if "loss" in line else line)

    def _send(self, metrics: dict[str, Any]) -> None:
        import wandb

        step, rest = metrics["step"], dict(metrics)
        if step < self._told_step:
            return
        self._told_step = step
        histograms, load = rest.pop("gradient_histogram", {}), rest.pop("tokens_per_expert", None)
        samples = rest.pop("samples", ())
        point = dict(flat_metrics(rest))
        if load is not None:
            caption = f"step {step}: layers down, experts across; red = twice the mean"
            point["expert_load"] = wandb.Image(heatmap(np.array(load)), caption=caption)
        edges = np.exp2(np.arange(HISTOGRAM_LOG2[0], HISTOGRAM_LOG2[1] + 1))
        for kind, counts in histograms.items():
            point[f"gradient/{kind}"] = wandb.Histogram(np_histogram=(np.array(counts), edges))
        if samples:
            cells = [[str(sample[key]) for key in SAMPLE] for sample in samples]
            point["samples"] = wandb.Table(columns=list(SAMPLE), data=cells)
        self._run.log(point, step=step)


def _code(name: str, run_dir: Path) -> Any:
    """An artifact of the code and of what was frozen, without secrets: the code may have been edited."""
    import wandb

    packages = [ROOT / package for package in ("trainer", "moe", "data_pipeline", "slurm", "conf")]
    paths = (path for package in packages for path in sorted(package.rglob("*")) if path.suffix in _CODE)
    files = {str(path.relative_to(ROOT)): path for path in paths}
    frozen = ("config.yaml", "overrides.txt", "environment.json", "git.txt")
    artifact = wandb.Artifact(name, type="code")
    for place, path in (files | {f"run/{file}": run_dir / file for file in frozen}).items():
        text = path.read_text(encoding="utf-8", errors="replace")
        if (shown := redacted(text)) == text:
            artifact.add_file(str(path), place)
        else:
            with artifact.new_file(place, encoding="utf-8") as file:
                file.write(shown)
    return artifact


def heatmap(load: np.ndarray) -> np.ndarray:
    """[L,E] tokens -> [8L,4E,3] uint8: white = the layer's mean, blue = no token, red = twice the mean."""
    away = np.clip(load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9) - 1, -1, 1)
    colours = np.stack([1 + np.minimum(away, 0), 1 - abs(away), 1 - np.maximum(away, 0)], axis=-1)
    return (255 * colours).astype(np.uint8).repeat(8, axis=0).repeat(4, axis=1)


def _open(path: Path) -> TextIO:
    """Open to append, after removing the incomplete last line that a killed attempt may have left."""
    path.touch()
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return path.open("a", buffering=1)


def _wandb_mode(configured: str) -> str:
    """`auto` is online if there is an API key, else offline; the variable WANDB_MODE overrides `auto`."""
    if configured != "auto":
        return configured
    key: Any = os.environ.get("WANDB_API_KEY")
    with suppress(OSError, netrc.NetrcParseError):  # there is none, or it cannot be read or parsed
        host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        key = key or netrc.netrc().authenticators(host)
    return os.environ.get("WANDB_MODE", "online" if key else "offline")
