"""The report of real runs, viewed in a real browser, and the profile of one run."""

import base64
import json
import re
import shutil
import subprocess
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from commands import SMALL, python
from matplotlib.image import imread

from trainer.engine.optimizer import KINDS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync", "--no-sandbox", "--hide-scrollbars"]


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> Path:
    """A folder with a sweep of two runs, `runs/s/0` and `runs/s/1`."""
    folder = tmp_path_factory.mktemp("runs")
    swept = ["name=s", "optimizer.lr=1e-3,5e-3", "tracker.watch=4", "tracker.expert_load_every_steps=2"]
    done = python("trainer", "-m", *SMALL, *corpus, *swept, cwd=folder, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def report(*paths: str, cwd: Path) -> str:
    done = python("trainer.report", *paths, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return (cwd / done.stdout.removeprefix("report: ").strip()).read_text()


def test_metrics_say_what_the_documents_define(runs, repository):
    """Every key of a real run is in docs/monitoring.md, and, with few exceptions, the other way round."""
    lines = [json.loads(line) for line in (runs / "runs/s/0/metrics.jsonl").read_text().splitlines()]
    step = next(line for line in lines if line["step"] == 4 and "loss" in line)
    table = (repository / "docs/monitoring.md").read_text()
    documented = set(re.findall(r"`([a-z_]+(?:/[a-z<>_]+)?)`", table.split("With [rewards]")[0]))
    plain = {re.sub(r"/.*", "/<kind>", key) for key in step}
    evaluated = {key for line in lines if "loss/validation" in line for key in line if "/" in key}
    held_out = {re.sub(r"/.*", "/<source>", key) for key in evaluated}
    assert plain | held_out <= documented, (plain | held_out) - documented
    on_gpu_or_elsewhere = {"mtp_loss", "memory_reserved_gib", "tokens_per_expert", "gradient_histogram"}
    layers = {f"layers/{key}" for key in step["layers"]}
    assert layers <= {f"layers/{key}" for key in documented}
    missing = {key for key in documented if "_" in key} - plain - held_out - set(step["layers"])
    assert missing <= on_gpu_or_elsewhere, missing

    assert len(step["layers"]["max_violation"]) == 2
    assert len(step["received_slots"]) == 2
    assert step["drop_fraction"] == 0
    assert sum(source["tokens"] for source in step["sources"].values()) == step["tokens"] == 4 * 512
    norms = sum(step[f"grad_norm/{kind}"] ** 2 for kind in KINDS)
    assert norms**0.5 == pytest.approx(step["grad_norm"], rel=1e-5)
    assert set(step["gradient_histogram"]) == set(KINDS)
    parts = ("forward", "backward", "optimizer", "communication", "other")
    assert all(line[f"{part}_seconds"] > 0 for line in lines if "loss" in line for part in parts)
    assert next(line for line in lines if line["step"] == 5)["save_stall_seconds"] > 0, "step 4 was saved"
    loads = [json.loads(line) for line in (runs / "runs/s/0/expert_load.jsonl").read_text().splitlines()]
    assert [line["step"] for line in loads] == [2, 4, 6, 8]
    tokens = np.array(loads[0]["tokens_per_expert"])
    assert tokens.shape == (2, 16)
    assert (tokens.sum(axis=1) == 512 * 4).all(), "top-4 of 512 tokens"


def test_a_report_is_one_file_with_its_pictures(runs):
    page = report("runs/s/0", cwd=runs)
    assert not re.search(r"https?://|<script|<link", page), "the page must load nothing from a network"
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 5
    for picture in pictures:
        pixels = imread(BytesIO(base64.b64decode(picture)))
        assert pixels.std() > 0.05, "a blank picture"
    written = {path.name for path in (runs / "runs/s/0/report").iterdir()}
    names = ("learning", "balance", "speed", "data", "experts")
    assert written == {"report.html", *(f"{name}.png" for name in names)}


def test_a_sweep_is_a_table_with_the_best_point_first(runs):
    page = report("runs/s", cwd=runs)
    table = page.split("<table>")[1].split("</table>")[0]
    assert "<th>optimizer.lr</th>" in table
    best, *others = re.findall(r"<tr.*?</tr>", table)[1:]
    assert "class=best" in best
    column = re.findall(r"<th>(.*?)</th>", table).index("loss/validation")
    losses = [float(re.findall(r"<td>(.*?)</td>", row)[column]) for row in (best, *others)]
    assert losses == sorted(losses)
    assert "0.005" in best, "the higher rate learns faster here"


def test_a_crashed_run_is_reported_as_far_as_it_came(runs, tmp_path):
    """State `running`, a half last line, a repeated step, no evaluation, a name that HTML must escape."""
    folder = tmp_path / "crashed"
    shutil.copytree(runs / "runs/s/0", folder, ignore=shutil.ignore_patterns("checkpoints", "report"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line][:3]
    again = {**steps[1], "loss": 77.125, "attempt": 2}
    text = "".join(json.dumps(line) + "\n" for line in (*steps[:2], again)) + json.dumps(steps[2])[:40]
    (folder / "metrics.jsonl").write_text(text)
    (folder / "state").write_text('{"state": "running", "attempt": 2}')
    (folder / "config.yaml").write_text(
        (folder / "config.yaml").read_text().replace("name: s/0", "name: <b>s</b>")
    )
    (folder / "alarms.jsonl").write_text('{"step": 2, "kind": "data stall", "text": "a < b", "attempt": 1}\n')
    page = report("crashed", cwd=tmp_path)
    assert "loss 77.125" in page, "the last logged loss must be shown"
    assert "step 2 of 8" in page
    assert "&lt;b&gt;s&lt;/b&gt;" in page
    assert "data stall</b> at step 2: a &lt; b" in page


def test_nothing_to_report_is_one_message(tmp_path):
    done = python("trainer.report", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert "no run with a logged step in nowhere" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_a_browser_shows_it(runs, tmp_path):
    """The page shows its words, and a screenshot of it is neither blank nor cut off."""
    report("runs/s/0", cwd=runs)
    page = (runs / "runs/s/0/report/report.html").resolve().as_uri()
    browser = [
        CHROMIUM,
        "--headless",
        *QUIET,
        f"--user-data-dir={tmp_path}/profile",
        "--window-size=1160,2300",
    ]
    seen = subprocess.run(
        [*browser, "--dump-dom", page], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    for words in ("Learns", "Balanced", "Fast", "finished", "step 8 of 8", "Does it learn?", "held out"):
        assert words in seen, words
    picture = tmp_path / "shot.png"
    subprocess.run([*browser, f"--screenshot={picture}", page], capture_output=True, timeout=120, check=True)
    pixels = imread(picture)[:, :, :3]  # [2300,1160,3]
    assert pixels.shape[:2] == (2300, 1160)
    for name, first, last in [("cards", 100, 300), ("pictures", 350, 900), ("more pictures", 1000, 1900)]:
        part = pixels[first:last]
        assert part.std() > 0.05, f"{name}: blank"
        assert len(np.unique(part.reshape(-1, 3), axis=0)) > 100, f"{name}: too few colours"
    assert pixels[:, :20].std() < 0.02, "the left margin must be empty"


@pytest.mark.slow
def test_a_profile_leaves_a_trace_and_the_run_as_it_was(runs):
    """The trace is in Perfetto's format; a text lists the ten largest costs and the collectives."""
    run_dir = runs / "runs/s/1"
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.name != ".lock"}
    done = python("trainer.profile", "runs/s/1", "--steps", "2", cwd=runs)
    assert done.returncode == 0, done.stdout + done.stderr
    after = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.name != ".lock"}
    changed = [path for path in after if before.get(path) != after[path] and path != run_dir]
    assert all(run_dir / "profile" in (path, *path.parents) for path in changed), changed
    for rank in (0, 1):
        events = json.loads((run_dir / f"profile/rank-{rank}.json").read_text())["traceEvents"]
        names = {event.get("name") for event in events}
        assert {"ProfilerStep#2", "ProfilerStep#3"} <= names, "two steps after two warm-up steps"
        assert "aten::mm" in names
    said = (run_dir / "profile/rank-0.txt").read_text()
    table = said.split("collective ")[0].splitlines()
    rules = [number for number, line in enumerate(table) if line.startswith("---")]
    assert rules[2] - rules[1] - 1 == 10, "the table must list ten costs"
    assert "all_to_all_single" in said.split("collective ")[1]
    assert "all_gather_into_tensor" in said.split("collective ")[1]
