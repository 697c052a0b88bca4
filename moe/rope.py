"""Rotary position embeddings (RoFormer, arXiv 2104.09864) in the half-split layout of Hugging Face."""
# T tokens, N heads, C head_dim, R <= C values that are rotated

import math

import torch
from torch import Tensor

from moe.config import ModelConfig


def rotary_tables(position_ids: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `position x theta^(-2i/R)`, i < R/2: two tables [T, 1, R/2] of `dtype`.

    position_ids: [T] integers. The angles are fp32. YaRN (arXiv 2309.00071, section 3.2) divides the slow
    frequencies by its factor, keeps the fast ones, and scales both tables.
    """
    size, scaling, scale = config.rotary_dim, config.rope_scaling, 1.0
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=position_ids.device) / size
    wavelengths = config.rope_theta**exponents  # [R/2], divided by 2 pi
    frequencies = 1.0 / wavelengths
    if scaling is not None:
        scale = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1

        def pair(turns: float) -> float:
            """The number (a fraction) of the pair that makes `turns` turns in the original context."""
            wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
            return size * math.log(wavelength) / (2 * math.log(config.rope_theta))

        first = max(math.floor(pair(scaling.beta_fast)), 0)
        last = min(math.ceil(pair(scaling.beta_slow)), size - 1)
        numbers = torch.arange(size // 2, dtype=torch.float32, device=position_ids.device)
        keep = 1 - ((numbers - first) / max(last - first, 0.001)).clamp(0, 1)  # [R/2] 1 = keep, 0 = divide
        frequencies = 1.0 / (scaling.factor * wavelengths) * (1 - keep) + frequencies * keep
    angles = position_ids.float()[:, None, None] * frequencies  # [T, 1, R/2]
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + R/2) of every head of x [T, N, C] by the angles of `rotary_tables`.

    The values from index R on are unchanged.
    """
    cos, sin = tables
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)  # [T, N, R/2] twice
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
