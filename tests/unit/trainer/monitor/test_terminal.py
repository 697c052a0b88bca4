"""The last lines of a run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.monitor.terminal import closing
from trainer.settings.config import RunConfig

METRICS = {"loss": 2.5, "step": 1200, "tokens_per_second": 5000.4, "mfu": 0.25}


@pytest.mark.parametrize(
    ("experiment", "question"), [("demo", "def __init__"), ("demo_sft", "--chat"), ("demo_rl", "--chat")]
)
def test_what_to_do_next_fits_what_was_learned(
    run_config: Callable[..., RunConfig], experiment: str, question: str
) -> None:
    config = run_config(f"experiment={experiment}", "name=t")
    said = closing(config, METRICS, {"held out": "a 2.4"}, Path("runs/it's"))
    rows = dict(line.strip().split(maxsplit=1) for line in said.splitlines() if line)
    assert rows["speed"] == "5,000 tokens/s, MFU 25.0%"
    assert rows["run"].endswith("""/checkpoints/step-00001200/hf""")
    assert ("loss" in rows) == (experiment != "demo_rl")
    generate, report = rows["next"].split(", python")
    assert question in generate
    assert ("--chat" in generate) == (question == "--chat")
    assert report == """ -m trainer.report 'runs/it'"'"'s'"""
