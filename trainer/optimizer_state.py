"""Fragments of optimizer state in safetensors files: written as ranks hold them, read as others need them."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from trainer.checkpoint_folder import read_header
from trainer.engine import Fragment


def write_fragments(path: Path, fragments: Iterable[Fragment]) -> int:
    """Write fragments into a new file, one tensor at a time on the host; returns the elements of all."""
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
    """Fill the views of `fragments` from files in which the same parameters may be cut elsewhere.

    Files are opened in order until nothing is missing. Raises ValueError that names what is.
    """
    wanted: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = defaultdict(list)
    missing: dict[tuple[str, str], int] = defaultdict(int)
    for fragment in fragments:
        for field, view in fragment.state.items():
            wanted[fragment.parameter, field].append((fragment.start, view))
            missing[fragment.parameter, field] += len(view)
    for path in files:
        if not any(missing.values()):
            break
        header = read_header(path)
        with open(path, "rb") as file:
            for name, stored in header.items():
                parameter, start, field = name.rsplit(":", 2)
                first, last = int(start), int(start) + stored.shape[0]
                for begin, view in wanted.get((parameter, field), ()):
                    low, high = max(begin, first), min(begin + len(view), last)
                    if low < high:
                        file.seek(stored.offset + 4 * (low - first))
                        values = np.fromfile(file, np.float32, high - low)
                        view[low - begin : high - begin].copy_(torch.from_numpy(values))
                        missing[parameter, field] -= high - low
    absent = [f"{parameter} ({field})" for (parameter, field), left in missing.items() if left]
    if absent:
        raise ValueError(f"no file holds all of {', '.join(absent[:8])}" + " and more" * (len(absent) > 8))
