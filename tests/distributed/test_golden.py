"""Losses of ten steps, kept in a file: a change that should not change the arithmetic does not change them.

If one should, run `python tests/distributed/test_golden.py` in the repository and say in the commit why.
"""

import json
from pathlib import Path

import layouts
from harness import run_ranks

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_moe.json"
KEYS = ("losses", "balance_losses", "grad_norms")
TOLERANCE = 1e-5


def ten_steps() -> dict[str, list[float]]:
    layout = ("deepspeed=zero1", "micro_batch_size=4", "parallel.ep_size=2")
    outcome = layouts.train_small(*layout, steps=10, same_rows=True)
    return {key: outcome[key] for key in KEYS}


def test_losses_are_the_golden_ones():
    golden = json.loads(GOLDEN.read_text())
    measured = run_ranks(ten_steps, 2)[0]
    for key in KEYS:
        worst = max(abs(a / b - 1) for a, b in zip(measured[key], golden[key], strict=True))
        assert worst < TOLERANCE, (key, worst)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(run_ranks(ten_steps, 2)[0], indent=1) + "\n")
