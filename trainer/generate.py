"""`python -m trainer.generate RUN_DIR "prompt"`: continue a prompt, greedily or with --temperature."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.tokenizer import load_tokenizer
from moe.config import ConfigError
from moe.inputs import Cache
from moe.model import CausalLM
from trainer.checkpoints.weights import device_for, load_model, selection_bias
from trainer.engine.cpu_products import fast_products
from trainer.settings.command import tells_mistakes
from trainer.settings.run_folder import hf_folder
from trainer.settings.typed import is_text


@torch.inference_mode()
def generate(
    model: CausalLM,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float,
    stop_id: int | None,
    bias: Tensor | None,
) -> Iterator[int]:
    """Yield the token ids that continue `prompt`, until `stop_id`; temperature 0 is greedy.

    `bias` comes from `selection_bias`. Earlier tokens are in the cache: a step computes only the new ones.
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
    parser.add_argument("--tokens", type=int, default=120, help="maximum number of new tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.tokens < 1 or not 0 <= options.temperature < float("inf"):
        parser.error("--tokens must be above 0 and --temperature a finite number, 0 or more")
    torch.manual_seed(options.seed)
    folder = hf_folder(options.source)
    device = device_for(options.source)
    model, bias = load_model(folder, device), selection_bias(folder, device)
    tokenizer = load_tokenizer(folder)
    if not is_text(options.prompt):
        raise ConfigError("the prompt is not text in UTF-8; correct its bytes")
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
