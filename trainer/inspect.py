"""`python -m trainer.inspect RUN_DIR|CHECKPOINT`: what is in a checkpoint, and is it whole? Torch-free."""

import math
import sys
from pathlib import Path

from moe.config import ConfigError
from trainer.checkpoint_folder import MANIFEST, checkpoints, damage, read_header, read_manifest
from trainer.run_folder import read_state

# What a tensor is, by a part of its hub name; the first that matches.
_KINDS = (
    ("mlp.experts.", "experts"),
    ("mlp.gate.", "router"),
    ("norm", "norms"),
    ("self_attn", "attention"),
    ("linear_attn", "attention"),
    ("mlp.", "feed-forward"),
    ("embed_tokens", "embedding"),
    ("lm_head", "embedding"),
)


def describe(checkpoint: Path) -> list[str]:
    """Lines on a checkpoint that is whole, from its manifest and the headers of its weights."""
    manifest = read_manifest(checkpoint)
    numbers: dict[str, tuple[int, int]] = {}  # elements and bytes by kind
    for path in (checkpoint / "hf").glob("*.safetensors"):
        for name, stored in read_header(path).items():
            kind = next((kind for part, kind in _KINDS if part in name), "other")
            for key in (kind, "in all"):
                elements, nbytes = numbers.get(key, (0, 0))
                numbers[key] = (elements + math.prod(stored.shape), nbytes + stored.nbytes)
    total = sum(size for size, _ in manifest["files"].values())
    layout = ", ".join(f"{key} {value}" for key, value in manifest["layout"].items())
    return [
        f"step {manifest['step']}, {manifest['tokens']:,} tokens, next row {manifest['next_row']:,}",
        f"written by attempt {manifest['attempt']} on {layout}",
        f"{len(manifest['files']) + 1} files, {total / 1e9:,.3f} GB with optimizer state; weights:",
        *(
            f"  {key:12}{count:>18,}{nbytes / 1e9:>12,.3f} GB"
            for key, (count, nbytes) in sorted(numbers.items())
        ),
    ]


def main(arguments: list[str]) -> int:
    """Returns 0 if all is whole, 1 if a checkpoint is damaged, 2 if there is none."""
    if len(arguments) != 1:
        print("usage: python -m trainer.inspect RUN_DIR|CHECKPOINT", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    found = checkpoints(folder)
    if found:
        try:
            state = read_state(folder)
            print(f"{folder}: {state['state']}, attempt {state['attempt']}, {len(found)} checkpoints")
        except ConfigError as error:
            print(error)
    elif folder.name.startswith("step-") or (folder / MANIFEST).is_file():
        found = [folder]
    if not found or not folder.is_dir():
        print(f"{folder} is no checkpoint, and no run folder that has one", file=sys.stderr)
        return 2
    problems = {checkpoint: damage(checkpoint) for checkpoint in found}
    for checkpoint, lines in problems.items():
        print(f"{checkpoint}: {'damaged' if lines else 'whole'}")
        for line in lines or describe(checkpoint):
            print(f"  {line}")
    return int(any(problems.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
