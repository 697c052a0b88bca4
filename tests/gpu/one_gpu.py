"""Where the suite of one GPU runs. GPU_TESTS_ON=cpu rehearses it on the CPU, where that makes sense."""

import os

PLACE = os.environ.get("GPU_TESTS_ON", "cuda")
ON_GPU = PLACE == "cuda"
if not ON_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Torch looks once, at the first product, whether this permits deterministic algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

USABLE = not ON_GPU or torch.cuda.is_available()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, relative to that of what is expected."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
