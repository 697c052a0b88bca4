"""`python -m trainer.inspect RUN_DIR|CHECKPOINT`: what is in a checkpoint, and is it whole? Torch-free."""

import math
import sys
from collections import Counter
from pathlib import Path

from trainer.checkpoint_folder import MANIFEST, CheckpointManifest, checkpoints, damage, read_header
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
    manifest = CheckpointManifest.load(checkpoint)
    elements: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for path in (checkpoint / "hf").glob("*.safetensors"):
        for name, stored in read_header(path).items():
            kind = next((kind for part, kind in _KINDS if part in name), "other")
            elements[kind] += math.prod(stored.shape)
            nbytes[kind] += stored.nbytes
    total = sum(entry.bytes for entry in manifest.files.values())
    layout = ", ".join(f"{key} {value}" for key, value in manifest.layout.items())
    return [
        f"step {manifest.step}, {manifest.tokens:,} tokens, next row of the data {manifest.next_row:,}",
        f"written by attempt {manifest.attempt} on {layout}",
        f"{len(manifest.files) + 1} files, {total / 1e9:,.3f} GB with optimizer state; weights:",
        *(f"  {kind:13}{elements[kind]:>18,}{nbytes[kind] / 1e9:>12,.3f} GB" for kind in sorted(elements)),
        f"  {'in all':13}{sum(elements.values()):>18,}{sum(nbytes.values()) / 1e9:>12,.3f} GB",
    ]


def main(arguments: list[str]) -> int:
    """Returns 0 if all is whole, 1 if a checkpoint is damaged, 2 if there is none."""
    if len(arguments) != 1:
        print("usage: python -m trainer.inspect RUN_DIR|CHECKPOINT", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    if (folder / "config.yaml").is_file():
        found = checkpoints(folder)
        state = read_state(folder)
        print(f"{folder}: {state['state']}, attempt {state['attempt']}, {len(found)} checkpoints")
    else:
        found = [folder] if folder.is_dir() else []
        if not (folder / MANIFEST).is_file() and not folder.name.startswith("step-"):
            found = []
    if not found:
        print(f"{folder} is no checkpoint, and no run folder with one", file=sys.stderr)
        return 2
    problems = {checkpoint: damage(checkpoint) for checkpoint in found}
    for checkpoint, lines in problems.items():
        print(f"{checkpoint}: {'damaged' if lines else 'whole'}")
        for line in lines or describe(checkpoint):
            print(f"  {line}")
    return int(any(problems.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
