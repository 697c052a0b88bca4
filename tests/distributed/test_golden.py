"""The losses of nine steps equal those in files: a change that keeps the arithmetic must keep them.

If the arithmetic has to change, run `python tests/distributed/test_golden.py` and say why in the commit.
"""

import json
from pathlib import Path

import pytest
from harness import run_ranks
from layouts import DENSE, FAMILY, train_small

FOLDER = Path(__file__).parents[1] / "golden"
MODELS = {
    "tiny_moe": ["model=tiny_moe"],
    **FAMILY,
    "64_experts_top_12": [
        *("model=tiny_qwen2_moe", "model.shared_expert_intermediate_size=24"),
        *("model.num_experts=64", "model.num_experts_per_tok=12"),
    ],
}
# Rounding grows with each step: a tenth would differ by 1.2e-5 in the norm between kinds of CPU.
KEYS = ("losses", "balance_losses", "grad_norms")
TOLERANCE = 1e-5


def nine_steps() -> dict[str, dict[str, list[float]]]:
    """Train on the same rows in each step, so that the loss has to fall."""
    found = {}
    for name, model in MODELS.items():
        ep_size = 1 if DENSE[0] in model else 2
        layout = ("deepspeed=zero1", "micro_batch_size=4", f"parallel.ep_size={ep_size}")
        outcome = train_small(*model, *layout, steps=9, same_rows=True)
        found[name] = {key: outcome[key] for key in KEYS}
    return found


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, list[float]]]:
    return run_ranks(nine_steps, 2, timeout=550)[0]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MODELS)
def test_losses_are_the_golden_ones(measured, name):
    golden = json.loads((FOLDER / f"{name}.json").read_text())
    for key in KEYS:
        worst = max(abs(a / b - 1) for a, b in zip(measured[name][key], golden[key], strict=True))
        assert worst < TOLERANCE, (key, worst)
    assert golden["losses"][-1] < golden["losses"][0] - 0.7


if __name__ == "__main__":
    for name, losses in run_ranks(nine_steps, 2, timeout=550)[0].items():
        (FOLDER / f"{name}.json").write_text(json.dumps(losses, indent=1) + "\n")
