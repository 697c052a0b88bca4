"""`python -m trainer.inspect RUN_DIR|CHECKPOINT`: list and check what checkpoints hold. Torch-free."""

import argparse
import math
import sys
from collections import Counter
from pathlib import Path

from safetensors import SafetensorError, safe_open

from moe.config import ConfigError
from trainer.checkpoints.folder import damage
from trainer.settings.run_folder import MANIFEST, checkpoints, read_manifest, read_state

# The kind of a tensor by a part of its hub name; the first match counts.
_KINDS = {
    "mlp.experts.": "experts",
    "mlp.gate.": "router",
    "norm": "norms",
    "_attn.": "attention",
    "mlp.": "feed-forward",
    "embed_tokens": "embedding",
    "lm_head": "embedding",
}
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


def describe(checkpoint: Path) -> list[str]:
    """Lines that describe an undamaged checkpoint, from its manifest and the headers of its weights."""
    manifest = read_manifest(checkpoint)
    elements, nbytes = Counter[str](), Counter[str]()  # by kind
    for path in (checkpoint / "hf").glob("*.safetensors"):
        with safe_open(path, framework="numpy") as reader:
            for name in reader.keys():  # noqa: SIM118, the reader is not a mapping
                stored = reader.get_slice(name)
                count = math.prod(stored.get_shape())
                kind = next((kind for part, kind in _KINDS.items() if part in name), "other")
                for row in (kind, "in all"):
                    elements[row] += count
                    nbytes[row] += count * _BYTES[stored.get_dtype()]
    total = sum(size for size, _ in manifest["files"].values())
    layout = ", ".join(f"{key} {value}" for key, value in manifest["layout"].items())
    return [
        f"step {manifest['step']}, {manifest['tokens']:,} tokens, next row {manifest['next_row']:,}",
        f"written by attempt {manifest['attempt']} on {layout}",
        f"{len(manifest['files']) + 1} files, {total / 1e9:,.3f} GB with optimizer state; weights:",
        *(f"  {kind:12}{elements[kind]:>18,}{nbytes[kind] / 1e9:>12,.3f} GB" for kind in sorted(elements)),
    ]


def main(arguments: list[str]) -> int:
    """Returns 0 if no checkpoint is damaged, 1 if one is, 2 if there is none or the usage is wrong."""
    parser = argparse.ArgumentParser(prog="python -m trainer.inspect", description=__doc__)
    parser.add_argument("folder", type=Path, help="run folder or checkpoint")
    folder = parser.parse_args(arguments).folder
    found = checkpoints(folder)
    if found:
        try:
            state = read_state(folder)
            print(f"{folder}: {state['state']}, attempt {state['attempt']}, {len(found)} checkpoints")
        except ConfigError as error:
            print(error)
    elif folder.is_dir() and (folder.name.startswith("step-") or (folder / MANIFEST).is_file()):
        found = [folder]
    if not found:
        print(f"{folder} is neither a checkpoint nor a run folder with a checkpoint", file=sys.stderr)
        return 2
    problems = {checkpoint: damage(checkpoint) for checkpoint in found}
    for checkpoint, lines in problems.items():
        described = []
        try:
            described = [] if lines else describe(checkpoint)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            lines.append(f"its manifest or its weights are of no checkpoint ({error!r})")
        print(f"{checkpoint}: {'damaged' if lines else 'whole'}")
        for line in lines or described:
            print(f"  {line}")
    return int(any(problems.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
