"""Speed of sampling: ours, transformers' generate, and ours without a cache.

    python tests/bench/sampling.py [model=NAME] [model.KEY=VALUE ...]
    ROWS=64 PROMPT=32 NEW=64 DTYPE=fp32 python tests/bench/sampling.py model=qwen2_5_0_5b

All continue the same random prompts by as many tokens, with the same weights: transformers reads the folder
that ours writes. On a CPU the seconds are those of this process on one thread, which other work on
the machine changes little; on a GPU they are those of the clock.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from transformers import AutoModelForCausalLM

from moe.hf import save_hf
from moe.init import init_weights
from moe.model import CausalLM
from moe.next_token import SamplingSettings
from moe.sampling import Request, sample
from trainer.engine.backends import choose_backends
from trainer.engine.cpu_products import fast_products
from trainer.ranks.runtime import DTYPES
from trainer.settings.config import RunConfig

ROWS, PROMPT, NEW = (
    int(os.environ.get(key, value)) for key, value in (("ROWS", 64), ("PROMPT", 32), ("NEW", 64))
)
DTYPE = DTYPES[os.environ.get("DTYPE", "fp32")]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REPEATS = 3


def seconds(run: Callable[[], object]) -> float:
    """The least of some runs, after one to warm up."""
    clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time
    found = []
    for _ in range(1 + REPEATS):
        started = clock()
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        found.append(clock() - started)
    return min(found[1:])


def tell(name: str, prefill: float, token: float) -> None:
    speed = f"{1e3 * token:7.1f} ms for a token of each, {ROWS / token:7,.0f} tokens/s"
    print(f"{name:<16} prompts {1e3 * prefill:7,.0f} ms; {speed}")


def measure(name: str, run: Callable[[int], object]) -> None:
    """Print the seconds until the first tokens, and those of each further token of all rows."""
    first, all_of_them = seconds(lambda: run(1)), seconds(lambda: run(NEW))
    tell(name, first, (all_of_them - first) / (NEW - 1))


def ours(model: CausalLM, prompts: torch.Tensor) -> Callable[[int], object]:
    requests = [Request(key, prompt) for key, prompt in enumerate(prompts.tolist())]

    def run(new: int) -> object:
        settings = SamplingSettings(1.0, 1.0, 0, 0, new, ())
        return dict(sample(model, requests, settings, rows_at_once=ROWS, device=DEVICE))

    return run


def theirs(folder: str, prompts: torch.Tensor) -> Callable[[int], object]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).eval().to(DEVICE)
    how = {"do_sample": True, "top_k": 0, "pad_token_id": 0}
    given = {"input_ids": prompts.to(DEVICE), "attention_mask": torch.ones_like(prompts).to(DEVICE)}
    return lambda new: model.generate(**given, **how, min_new_tokens=new, max_new_tokens=new)


@torch.no_grad()
def uncached(model: CausalLM, prompts: torch.Tensor) -> None:
    """One forward of all rows at the mean length: what each token costs without a cache."""
    length = PROMPT + NEW // 2
    ids = prompts.repeat(1, -(-length // PROMPT))[:, :length].to(DEVICE)
    positions = torch.arange(length, device=DEVICE).expand(ROWS, -1)
    borders = torch.arange(0, ROWS * length + 1, length, dtype=torch.int32, device=DEVICE)
    model(ids, positions, borders, lengths=[length] * ROWS)


def main(overrides: list[str]) -> None:
    with initialize_config_module("conf", version_base="1.3"):
        config = RunConfig.load(compose("train", ["name=bench", "model=tiny_moe", *overrides])).model
    torch.manual_seed(0)
    backend = choose_backends(config, "auto", DEVICE, DTYPE).names.get("experts", "loop")
    model = CausalLM(config, backend=backend).to(DEVICE, DTYPE).eval()
    init_weights(model, 0)
    prompts = torch.randint(1, config.vocab_size, (ROWS, PROMPT))
    print(f"{ROWS} prompts of {PROMPT} tokens, {NEW} new ones each, {DTYPE}, {DEVICE}")
    with fast_products(DEVICE, DTYPE):
        measure("ours", ours(model, prompts))
        whole = seconds(lambda: uncached(model, prompts))
        tell("without a cache", whole * PROMPT / (PROMPT + NEW // 2), whole)
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, Path(folder))
        measure("transformers", theirs(folder, prompts))


if __name__ == "__main__":
    main(sys.argv[1:])
