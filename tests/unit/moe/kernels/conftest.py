"""The kernels against their oracles: on a GPU if there is one, else under Triton's interpreter.

Triton reads its mode only once per process, so tests/unit/moe/test_kernels.py starts a process of its own.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device() -> torch.device:
    """The device of the kernels."""
    return torch.device("cpu" if INTERPRETED else "cuda")
