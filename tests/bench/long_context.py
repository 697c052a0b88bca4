"""Time and peak memory of one forward and backward of the tiny models, by length of one document.

`python tests/bench/long_context.py [MODEL ...]`: one process per measurement. Memory is what the step adds to
the process; if memory is linear, it doubles with the length.
"""

import resource
import subprocess
import sys
import time
from itertools import product

LENGTHS = (4096, 8192, 16384, 32768)
MODELS = ("tiny_dense", "tiny_moe", "tiny_qwen3_next")


def measure(name: str, length: int) -> tuple[float, float]:
    """Seconds of a forward and backward over one document, and the MiB that it adds at its peak."""
    import torch

    from moe.init import init_weights
    from moe.model import CausalLM
    from trainer.models import shipped_models

    config = shipped_models()[name]
    config.max_position_embeddings = length
    model = CausalLM(config, recompute="full")
    init_weights(model, seed=0)

    def step(tokens: int) -> None:
        ids = torch.randint(0, config.vocab_size, (1, tokens))
        borders = torch.tensor([0, tokens], dtype=torch.int32)
        output = model(ids, torch.arange(tokens).unsqueeze(0), borders, labels=ids)
        output.cross_entropy_sum.backward()

    step(64)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    step(length)
    seconds = time.perf_counter() - start
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def measured(name: str, length: int) -> tuple[float, float]:
    """Run `measure` in its own process."""
    command = [sys.executable, __file__, "--measure", name, str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, mebibytes = map(float, done.stdout.split())
    return seconds, mebibytes


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(*measure(sys.argv[2], int(sys.argv[3])))
    else:
        for name, length in product(sys.argv[1:] or MODELS, LENGTHS):
            seconds, mebibytes = measured(name, length)
            print(f"{name:20}{length:8} tokens{seconds:9.1f} s{mebibytes:9.0f} MiB", flush=True)
