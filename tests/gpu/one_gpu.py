"""The device of the GPU tests. GPU_TESTS_ON=cpu runs those that do not need a GPU on the CPU."""

import os

PLACE = os.environ.get("GPU_TESTS_ON", "cuda")
ON_GPU = PLACE == "cuda"
if not ON_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Torch reads this once, at the first matrix product; deterministic algorithms need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

USABLE = not ON_GPU or torch.cuda.is_available()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, divided by the norm of the expected tensor."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
