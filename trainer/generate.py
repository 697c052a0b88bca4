"""`python -m trainer.generate RUN_DIR "prompt"`: what has it learned? Greedy, or --temperature."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.tokenizer import load_tokenizer
from moe.attention import Cache
from moe.config import ConfigError, ModelConfig
from moe.hf import load_hf, stored_dtype
from moe.model import CausalLM
from trainer.checkpoints.folder import reading
from trainer.engine.backends import choose_backends
from trainer.engine.cpu_products import fast_products
from trainer.ranks.device import choose_device
from trainer.settings.command import tells_mistakes
from trainer.settings.run_folder import hf_folder, read_run, run_of


def device_for(source: Path) -> torch.device:
    """Where a command computes the model of `source`: on CUDA where usable, unless the run has device=cpu."""
    run_dir = run_of(source)
    ruled_out = (run_dir / "config.yaml").is_file() and read_run(run_dir).get("device") == "cpu"
    device, warning = choose_device("cpu" if ruled_out else "auto")
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    return device


def load_model(folder: Path, device: torch.device) -> CausalLM:
    """The model of a Hugging Face folder, in its dtype, whole on one device.

    Raises ConfigError if the folder has none.
    """
    config, dtype = ModelConfig.of_folder(folder), stored_dtype(folder)
    backend = choose_backends(config, "auto", device, dtype).names.get("experts", "loop")
    with torch.device("meta"):
        model = CausalLM(config, backend=backend).to(dtype)
    model.to_empty(device=device)
    with reading(folder):
        load_hf(model, folder)
    return model.eval()


def selection_bias(folder: Path, device: torch.device) -> Tensor | None:
    """[L,E] by which the run of a checkpoint's `hf` folder chooses experts; None where nothing biases it."""
    balance = folder.parent / "balance.pt"
    if not balance.is_file():
        return None
    return torch.load(balance, weights_only=True, map_location=device).get("bias")


@torch.inference_mode()
def generate(
    model: CausalLM,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float,
    stop_id: int | None,
    bias: Tensor | None,
) -> Iterator[int]:
    """Token ids that continue `prompt`, one by one, until `stop_id`; temperature 0 is greedy.

    `bias` is `selection_bias`. Every step computes one token; what came before is in the cache.
    """
    device = next(model.parameters()).device
    cache = Cache()
    tokens = torch.tensor([prompt], device=device)  # [1, S]
    for _ in range(max_new_tokens):
        seen, new = cache.length, tokens.shape[1]
        positions = torch.arange(seen, seen + new, device=device).unsqueeze(0)
        borders = torch.tensor([0, new], dtype=torch.int32, device=device)
        output = model(tokens, positions, borders, cache=cache, selection_bias=bias, lengths=[new])
        logits = output.logits[0, -1]  # [V]
        chosen = logits.argmax(-1, keepdim=True)
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1)
        if chosen.item() == stop_id:
            return
        yield int(chosen)
        tokens = chosen.unsqueeze(0)


@tells_mistakes
def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.generate", description=__doc__)
    parser.add_argument("source", type=Path, help="run folder, checkpoint, or Hugging Face folder")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=120, help="most new tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.tokens < 1 or not 0 <= options.temperature < float("inf"):
        parser.error("--tokens must be above 0 and --temperature a finite number from 0 on")
    torch.manual_seed(options.seed)
    folder = hf_folder(options.source)
    device = device_for(options.source)
    model, bias = load_model(folder, device), selection_bias(folder, device)
    tokenizer = load_tokenizer(folder)
    if not (prompt := tokenizer.encode(options.prompt)):
        raise ConfigError("the prompt is empty; give at least one character")
    if options.tokens > (room := model.config.max_position_embeddings - len(prompt)):
        what = f"--tokens {options.tokens} does not fit"
        raise ConfigError(f"{what}; the model has room for {room} after this prompt")
    shown = options.prompt
    print(shown, end="", flush=True)
    new: list[int] = []
    how = (options.tokens, options.temperature, tokenizer.end_of_text, bias)
    with fast_products(device, model.lm_head.weight.dtype):
        for token in generate(model, prompt, *how):
            new.append(token)
            text = options.prompt + tokenizer.decode(new)
            if not text.endswith("�"):  # wait for the rest of a character that spans tokens
                print(text[len(shown) :], end="", flush=True)
                shown = text
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
