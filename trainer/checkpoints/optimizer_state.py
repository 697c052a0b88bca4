"""Fragments of optimizer state in safetensors files: written in one layout of ranks, read in any other."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from trainer.engine.engine import Fragment


def write_fragments(path: Path, fragments: Iterable[Fragment]) -> int:
    """Write a new file, with one tensor at a time copied to the host; returns the number of all elements."""
    tensors = [
        (f"{fragment.parameter}:{fragment.start}:{field}", view)
        for fragment in fragments
        for field, view in fragment.state.items()
    ]
    header, end = {}, 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # data begin at a multiple of 8
    with open(path, "xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, tensor in tensors:
            file.write(tensor.to("cpu").numpy().data)
    return sum(tensor.numel() for _, tensor in tensors)


def fill_fragments(fragments: Iterable[Fragment], files: Iterable[Path]) -> None:
    """Fill the views of `fragments` from files that may divide the parameters into other fragments.

    Files are opened in order until no element is missing. Raises ValueError that names missing states.
    """
    wanted: dict[tuple[str, str], list[tuple[int, Tensor]]] = defaultdict(list)
    missing: dict[tuple[str, str], int] = defaultdict(int)
    for fragment in fragments:
        for field, view in fragment.state.items():
            wanted[fragment.parameter, field].append((fragment.start, view))
            missing[fragment.parameter, field] += len(view)
    for path in files:
        if not any(missing.values()):
            break
        with safe_open(path, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118, the reader is not a mapping
                parameter, start, field = name.rsplit(":", 2)
                stored, first = reader.get_slice(name), int(start)
                last = first + stored.get_shape()[0]
                for begin, view in wanted.get((parameter, field), ()):
                    low, high = max(begin, first), min(begin + len(view), last)
                    if low < high:
                        view[low - begin : high - begin].copy_(stored[low - first : high - first])
                        missing[parameter, field] -= high - low
    absent = [f"{parameter} ({field})" for (parameter, field), left in missing.items() if left]
    if absent:
        raise ValueError(f"files lack elements of {', '.join(absent[:8])}" + " and more" * (len(absent) > 8))
