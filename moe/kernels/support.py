"""Where the Triton kernels run."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor


def run_on(x: Tensor) -> bool:
    """Whether the kernels take `x`; otherwise the caller's torch code does the same."""
    return _on and x.dtype in _DTYPES and obstacle(x.device) is None


_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_on = True


def turn_off() -> None:
    """From now on torch's code runs everywhere."""
    global _on
    _on = False


@contextmanager
def turned_off() -> Iterator[None]:
    """Inside, torch's code runs everywhere."""
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before


@functools.cache
def obstacle(device: torch.device) -> str | None:
    """Why no kernel runs on `device`, and a remedy; None if they do.

    They need a CUDA device, or TRITON_INTERPRET=1, which runs them slowly on any device.
    """
    if find_spec("triton") is None:
        return "Triton is not installed; run `pip install triton`"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, not {device.type}"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"they want compute capability 8.0, not {capability[0]}.{capability[1]}"
    return None
