"""`make bench-gpu`: layers of Qwen3-30B-A3B on one GPU, ours by backend and recompute against transformers.

Steps of 4,096 tokens in bf16 with optimizer states (ZeRO-1 on one rank), with 2 layers and with as many as
fit; the difference gives a layer's time, and with it the step of all 48. Routing is that of fresh weights.
"""

import sys
from typing import Any

import torch
from bench import best, flops, run
from tables import table
from work import Work

from trainer.throughput import peak_flops

SHAPE = {"hidden": 2048, "heads": 32, "key_value_heads": 4, "head_dim": 128, "width": 768, "vocab": 151936}
STEP = {"dtype": "bf16", "rows": 1, "seq_len": 4096, "document": 4096}
STEP |= {"zero_stage": 1, "warm_up": 3, "steps": 10}
DEPTHS = (14, 12, 10, 8, 6, 4)  # tried from the left until one fits
LAYERS = 48


def measure(name: str, **work: Any) -> list[Any]:
    """A line of the table."""
    few = run(name, **STEP, **SHAPE, layers=2, **work)
    for depth in DEPTHS if few else ():
        many = run(name, **STEP, **SHAPE, layers=depth, **work)
        if few and many:
            break
    else:
        return ["does not run"]
    low, high = best([few])["seconds"], best([many])["seconds"]
    seconds = low + (LAYERS - 2) * (high - low) / (depth - 2)
    rate = flops(Work(**STEP, **SHAPE, layers=LAYERS)) / seconds
    peak = peak_flops(torch.device("cuda"), torch.bfloat16)
    cells = [depth, f"{high:.3f}", f"{STEP['seq_len'] / seconds:,.0f}", f"{rate / 1e12:.0f}"]
    return [*cells, f"{rate / peak:.1%}", f"{many['peak_gib']:.1f}"]


def main() -> int:
    """Print the table."""
    if not torch.cuda.is_available():
        print("make bench-gpu needs an NVIDIA GPU: torch.cuda.is_available() is false here", file=sys.stderr)
        return 2
    rows = []
    for backend in ("grouped", "liger", "megablocks"):
        for recompute in ("none", "experts", "full"):
            rows.append([backend, recompute, *measure("ours", backend=backend, recompute=recompute)])
    rows.append(["transformers grouped_mm", "none", *measure("transformers")])
    head = [
        "experts",
        "recompute",
        "layers",
        "s per step",
        "tokens/s at 48 layers",
        "TFLOP/s",
        "MFU",
        "peak GiB",
    ]
    print(table(head, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
