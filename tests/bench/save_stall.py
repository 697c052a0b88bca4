"""How long training pauses for a save: `python tests/bench/save_stall.py [key=value ...]`.

Three runs of the demo's model on 2 ranks: without saves, with saves in place, with saves in the background.
Prints the pause per save in seconds and in steps, its bytes and files, and the peak memory of rank 0.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from commands import prepare_corpus, python

STEPS, EVERY = 24, 4
SETTINGS = [
    "model=tiny_moe",
    "model.vocab_size=512",
    "parallel.nproc_per_node=2",
    "parallel.ep_size=2",
    "stage.seq_len=256",
    "stage.global_batch_size=8",
    f"stage.train_tokens={STEPS * 8 * 256}",
    "micro_batch_size=4",
    "schedule.warmup_steps=2",
    "evaluate.every_steps=0",
    "tracker.log_every_steps=1",
    "checkpoint.keep=1",
]


def measure(root: Path, name: str, *overrides: str) -> None:
    done = python("trainer", f"name={name}", *SETTINGS, *overrides, cwd=root, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (root / f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    steps = [line["step_seconds"] for line in lines if "step_seconds" in line][2:]
    stalls = [line["save_stall_seconds"] for line in lines if "save_stall_seconds" in line]
    (checkpoint,) = (root / f"runs/{name}/checkpoints").iterdir()
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    saves = 1 if name == "none" else STEPS // EVERY
    step, stall = statistics.median(steps), sum(stalls) / saves
    memory = max(line["memory_gib"] for line in lines if "memory_gib" in line)
    print(
        f"{name:11} step {step:6.3f} s, stall per save {stall:6.3f} s = {stall / step:5.2f} steps, "
        f"{sum(size for size, _ in files.values()) / 1e9:.3f} GB in {len(files) + 1} files, "
        f"peak {memory:.2f} GiB"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        settings = [*prepare_corpus(Path(folder)), *sys.argv[1:]]
        measure(Path(folder), "none", "checkpoint.every_steps=1000", *settings)
        measure(
            Path(folder),
            "in_place",
            f"checkpoint.every_steps={EVERY}",
            "checkpoint.background=false",
            *settings,
        )
        measure(Path(folder), "background", f"checkpoint.every_steps={EVERY}", *settings)
