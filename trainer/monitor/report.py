"""The report of runs: a page, with its pictures, on whether a run learns, is balanced and is fast."""

import json
from base64 import b64encode
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import filter as matching
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import matplotlib.style
import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from moe.config import ConfigError
from trainer.settings.benchmarks import Score, newest_scores, score_rows
from trainer.settings.config import RunConfig
from trainer.settings.run_folder import flat, flat_metrics, read_frozen, read_state

_COLUMNS = ("loss", "loss/validation", "effective_experts", "tokens_per_second", "mfu")


@dataclass
class Run:
    """The contents of a run folder; for a repeated step, its last metrics."""

    folder: Path
    config: RunConfig
    state: str
    points: list[dict[str, Any]]  # of metrics.jsonl, flattened, in the order of steps
    loads: list[dict[str, Any]]  # step, tokens_per_expert [L,E]
    alarms: list[dict[str, Any]]
    samples: list[dict[str, Any]]  # completions of the last logged step
    scores: list[Score]  # of benchmarks, the newest of each task

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Raises ConfigError for a folder that is not a run folder."""
        points = [dict(flat_metrics(line)) for line in _lines(folder / "metrics.jsonl")]
        loads, alarms = _lines(folder / "expert_load.jsonl"), _lines(folder / "alarms.jsonl")
        state, samples = read_state(folder)["state"], _lines(folder / "samples.jsonl")
        newest = [line for line in samples if _written(line) == _written(samples[-1])]
        lines = (_last_said(points), _last_said(loads), alarms, newest, newest_scores(folder))
        return cls(folder, RunConfig.of_run(folder), state, *lines)

    def series(self, *keys: str) -> list[np.ndarray]:
        """Tokens and the values of `keys`, from the points that have all of them."""
        points = [point for point in self.points if all(key in point for key in keys)]
        return [np.array([point[key] for point in points]) for key in ("tokens", *keys)]

    def last(self, key: str, default: float = float("nan")) -> float:
        """The newest value of a metric, or `default`."""
        return next((point[key] for point in reversed(self.points) if key in point), default)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON Lines file: a running or killed run may leave an incomplete last line."""
    text = path.read_text(errors="replace") if path.exists() else ""
    try:
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        if all(isinstance(line["step"], int) for line in lines):
            return lines
        why = "a step is no integer"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = repr(error)
    raise ConfigError(f"{path} cannot be read ({why}); remove the damaged lines, or report other runs")


def _written(line: dict[str, Any]) -> tuple[int, int]:
    """The step and the attempt of a line: a step that is repeated is written again."""
    return line["step"], line.get("attempt", 0)


def _last_said(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last line of each step and kind of line (training, evaluation, other)."""
    measured = ("loss/validation", "reward/validation", "benchmark/")
    last = {
        (line["step"], "loss" in line, any(key.startswith(measured) for key in line)): line for line in lines
    }
    return [last[key] for key in sorted(last)]


def find_runs(paths: list[Path]) -> list[Run]:
    """The runs with a logged step in run folders and sweeps (folders of run folders), the best first.

    Raises ConfigError if there is none.
    """
    configs = [file for path in paths for name in ("", "*/") for file in path.glob(f"{name}config.yaml")]
    runs = [run for run in (Run.read(file.parent) for file in sorted(configs)) if run.series("loss")[0].size]
    if not runs:
        where = ", ".join(map(str, paths))
        raise ConfigError([f"no run with a logged step in {where}; name run folders or sweeps"])
    return sorted(runs, key=_badness)


def _badness(run: Run) -> float:
    """By which runs are sorted: the held-out reward, turned round, or the loss."""
    if run.config.rl is not None:
        return -run.last("reward/validation", run.last("reward"))
    return run.last("loss/validation", run.last("loss"))


def draw(runs: list[Run], panels: dict[str, list[str]]) -> Figure:
    """Draw the panels of report.yaml over tokens: all runs if a panel has one metric, else the best run."""
    known = sorted({key for point in runs[0].points for key in point})
    found = {title: [key for of in panels[title] for key in matching(known, of)] for title in panels}
    found = {title.removeprefix("?"): keys for title, keys in found.items() if keys or title[0] != "?"}
    figure, places = _grid(len(found), 3, 2.6)
    for axes, (title, keys) in zip(places, found.items(), strict=True):
        if len(runs) > 1 and "loss/validation" in keys:
            keys = ["loss/validation"]
        if title.startswith("+") and keys:
            axes.stackplot(*runs[0].series(*keys), labels=[_label(_short(key)) for key in keys])
        for run in runs if len(keys) == 1 else runs[:1]:
            for key in keys if not title.startswith("+") else []:
                tokens, values = run.series(key)
                name = _label(run.config.name if len(keys) == 1 else _short(key))
                axes.plot(tokens, values, label=name, marker="o" if len(tokens) < 20 else "")
        axes.set_yscale("log" if title.endswith("log") else "linear")
        axes.set_title(title.removeprefix("+").removesuffix(", log"))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if len(keys) > 1 or 1 < len(runs) < 12:
            axes.legend()
    figure.supxlabel("tokens")
    return figure


def _grid(panels: int, across: int, height: float, shared: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of `panels` panels, at most `across` side by side."""
    across = min(across, panels)
    down = -(-panels // across)
    figure = Figure(figsize=(11, 0.4 + height * down))
    places = figure.subplots(down, across, squeeze=False, sharex=shared, sharey=shared)
    for axes in places.flat[panels:]:
        axes.set_visible(False)
    return figure, list(places.flat)[:panels]


def _short(key: str) -> str:
    """sources/code/tokens -> code, layers/z_loss/3 -> 3, forward_seconds -> forward"""
    if key.startswith("layers/"):
        return key.rpartition("/")[2]
    return key.split("/")[1] if "/" in key else key.removesuffix("_seconds").replace("_", " ")


def _label(name: str) -> str:
    """A name in a legend: matplotlib would set $...$ as mathematics, and leave out one that begins with _."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def draw_experts(run: Run) -> Figure:
    """The load of each expert over steps, a panel per sparse layer."""
    load = np.array([line["tokens_per_expert"] for line in run.loads], dtype=float)  # [steps,L,E]
    load /= np.maximum(load.mean(axis=2, keepdims=True), 1e-9)
    figure, places = _grid(load.shape[1], 4, 1.9, shared=True)
    first, last = run.loads[0]["step"], run.loads[-1]["step"]
    extent = (first, max(last, first + 1), load.shape[2] - 0.5, -0.5)
    for layer, axes in enumerate(places):
        axes.grid(visible=False)
        axes.set_title(f"sparse layer {layer}")
        picture = axes.imshow(
            load[:, layer].T, "RdBu_r", aspect="auto", interpolation="nearest", vmin=0, vmax=2, extent=extent
        )
    figure.supxlabel("step")
    figure.supylabel("expert")
    figure.colorbar(picture, ax=places, label="load / mean of the layer", extend="max")
    return figure


def sweep_table(runs: list[Run]) -> str:
    """A table of the runs, the best first: the keys in which they differ, and their results."""
    configs = [flat(read_frozen(run.folder / "config.yaml")) for run in runs]
    swept = [key for key in configs[0] if len({str(config.get(key)) for config in configs}) > 1]
    keys = [key for key in swept if key != "name"]
    rows = []
    for run, config in zip(runs, configs, strict=True):
        results = [f"{run.last(key):,.5g}" for key in _COLUMNS]
        cells = [run.config.name, *(config.get(key) for key in keys), run.last("step"), run.state, *results]
        rows.append("".join(f"<td>{escape(str(cell))}</td>" for cell in cells))
    head = "".join(f"<th>{escape(key)}</th>" for key in ("run", *keys, "step", "state", *_COLUMNS))
    return f"<h2>Comparison</h2><table><tr>{head}</tr><tr class=best>{'</tr><tr>'.join(rows)}</tr></table>"


def cards(run: Run) -> str:
    """Three answers: does it learn, is it balanced, is it fast?"""
    limits = run.config.tracker.alarms
    goal, better = ("loss", -1) if run.config.rl is None else ("reward", 1)
    (_, values), (_, held_out) = run.series(goal), run.series(f"{goal}/validation")
    recent = max(1, len(values) // 8)  # logged steps, compared with the same number before them
    gain = values[-recent:].mean() - values[-2 * recent : -recent].mean() if len(values) > 1 else 0.0
    verdict = "good" if better * gain > 0 else "watch" if better * gain > -0.02 * abs(values[-1]) else "bad"
    said = [f"{values[0]:.3f} at the start", *(f"held out {value:.3f}" for value in held_out[-1:])]
    found = [_card("Learns", verdict, f"{goal} {values[-1]:.3f}", said, values)]
    if "effective_experts" in run.points[0]:
        share = run.last("effective_experts")
        verdict = "good" if share > 0.5 else "watch" if share > limits.effective_experts else "bad"
        busiest = f"busiest {1 + run.last('max_violation'):.1f} x the mean"
        said = [f"balance {run.last('balance_loss'):.3f}", busiest, f"{run.last('dead_experts'):.0f} idle"]
        history = run.series("effective_experts")[1]
        found.append(_card("Balanced", verdict, f"{share:.0%} of experts in effect", said, history))
    slow = run.last("stall_fraction") > limits.data_stall or "straggler" in (a["kind"] for a in run.alarms)
    step, history = run.last("step_seconds"), run.series("tokens_per_second")[1]
    said = [
        f"MFU {run.last('mfu'):.1%}",
        f"{run.last('communication_seconds', 0.0) / step:.0%} communication",
        f"{run.last('data_wait_seconds') / step:.1%} waiting for data",
        f"{sum(run.series('save_stall_seconds')[1]):.0f} s saving",
    ]
    found.append(_card("Fast", "watch" if slow else "good", f"{history[-1]:,.0f} tokens/s", said, history))
    return "".join(found)


def _card(title: str, verdict: str, figure: str, said: list[str], history: np.ndarray) -> str:
    heights = 38 - 36 * (history - history.min()) / max(np.ptp(history), 1e-12)
    places = zip(np.linspace(0, 200, len(history)), heights, strict=True)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    head = f"<h2>{title}<span>{verdict}</span></h2><b>{figure}</b><p>{' · '.join(said)}</p>"
    picture = f'<svg viewBox="0 0 200 40" preserveAspectRatio="none"><polyline points="{line}"/></svg>'
    return f'<section class="card {verdict}">{head}{picture}</section>'


def samples_table(run: Run) -> str:
    """Completions of the last logged step, to be read; what the model and the prompts say is only text."""
    rows = []
    for one in run.samples:
        reasons = "<br>".join(escape(f"{name}: {said}") for name, said in one["reasons"].items())
        texts = "".join(f"<td><pre>{escape(str(one[key]))}</pre></td>" for key in ("prompt", "completion"))
        rows.append(f"<tr>{texts}<td>{one['reward']:.2f}</td><td>{reasons}</td></tr>")
    head = "<tr><th>prompt</th><th>completion</th><th>reward</th><th>reasons</th></tr>"
    step = run.samples[0]["step"]
    return f"<h2>Completions of step {step:,}</h2><table class=samples>{head}{''.join(rows)}</table>"


def benchmarks_table(scores: list[Score]) -> str:
    """The newest scores of benchmarks, with the step and the number of examples of each task."""
    rows = []
    for score, shown in zip(scores, score_rows(scores), strict=True):
        about = (
            (f"{score.step:,}", score.about.get("num_fewshot"), score.about.get("samples"))
            if shown[0]
            else ()
        )
        cells = (escape("-" if cell is None else str(cell)) for cell in (*shown, *(about or ("", "", ""))))
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    head = "".join(
        f"<th>{title}</th>" for title in ("task", "metric", "value", "", "step", "shots", "documents")
    )
    return f"<h2>Benchmarks</h2><table><tr>{head}</tr><tr>{'</tr><tr>'.join(rows)}</tr></table>"


def write_report(runs: list[Run], out: Path) -> Path:
    """Write `report.html` and its pictures into the folder `out`; returns the file."""
    out.mkdir(parents=True, exist_ok=True)
    best, here = runs[0], Path(__file__)
    parts = [sweep_table(runs)] if len(runs) > 1 else []
    with matplotlib.style.context(here.with_suffix(".mplstyle")):
        pictures = yaml.safe_load(here.with_suffix(".yaml").read_text())
        drawn = {
            name: (picture["title"], draw(runs, picture["panels"]))
            for name, picture in pictures.items()
            if picture.get("of") is None or (picture["of"] == "rl") == (best.config.rl is not None)
        }
        if best.loads:
            drawn["experts"] = ("Where do the tokens go?", draw_experts(best))
        for name, (title, figure) in drawn.items():
            figure.savefig(out / f"{name}.png")
            source = f"data:image/png;base64,{b64encode((out / f'{name}.png').read_bytes()).decode()}"
            parts.append(f'<h2>{title}</h2><img alt="{title}" src="{source}">')
    if best.scores:
        parts.append(benchmarks_table(best.scores))
    if best.samples:
        parts.append(samples_table(best))
    alarms = [
        f"<b>{escape(str(alarm.get('kind')))}</b> at step {alarm['step']}: {escape(str(alarm.get('text')))}"
        for alarm in best.alarms
    ]
    step, total, name = best.last("step"), best.config.stage.total_steps, best.config.name
    eta = f", {timedelta(seconds=int(best.last('eta_seconds')))} to go" if best.state == "running" else ""
    page = Template(here.with_suffix(".html").read_text()).substitute(
        title=escape(name if len(runs) == 1 else f"{len(runs)} runs, the best: {name}"),
        state=escape(best.state),
        progress=f"{step / total:.1%}",
        facts=f"step {step:,} of {total:,}, {best.last('tokens'):,} tokens{eta}",
        cards=cards(best),
        alarms=f"<h2>Alarms</h2><ul><li>{'<li>'.join(alarms)}</ul>" if alarms else "",
        parts="\n".join(parts),
    )
    (out / "report.html").write_text(page)
    return out / "report.html"
