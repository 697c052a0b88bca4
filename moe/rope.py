"""Rotary position embeddings (RoFormer, arXiv 2104.09864) in the half-split layout of Hugging Face."""
# T tokens, N heads, D head_dim

import torch
from torch import Tensor


def rotary_tables(
    position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `position x theta^(-2i/D)`, i < D/2: two tables [T, 1, D/2] of `dtype`.

    position_ids: [T] integers. The angles are fp32.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids.float()[:, None, None] * (1.0 / theta**exponents)  # [T, 1, D/2]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + D/2) of every head of x [T, N, D] by the angles of `rotary_tables`."""
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)  # [T, N, D/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
