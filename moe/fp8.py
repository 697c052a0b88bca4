"""Weights in FP8 with a scale for each block, as Qwen releases them (arXiv 2412.19437, section 3.3).

A weight W [R, C] is stored as E4M3 numbers, and beside it under the name W_scale_inv the scales
[ceil(R / BLOCK), ceil(C / BLOCK)]; a number times the scale of its block is the weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
STORED = "F8_E4M3"  # as safetensors names it
SCALES = "_scale_inv"  # the end of the name of the scales
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a weight [R, C]."""
    return tuple(-(-size // BLOCK) for size in shape)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [R, C] in E4M3, and its scales in fp32: the largest number of each block becomes the largest
    of E4M3; a block of zeros has the scale 1."""
    rows, columns = weight.shape
    blocks = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = blocks.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [r, BLOCK, c, BLOCK]
    largest = blocks.abs().amax((1, 3))
    scales = torch.where(largest > 0, largest / _LARGEST, 1.0)
    small = (blocks / scales[:, None, :, None]).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return small.flatten(2).flatten(0, 1)[:rows, :columns].contiguous(), scales


def dequantise(
    part: Tensor, scales: Tensor, place: tuple[int | slice, ...], shape: tuple[int, ...]
) -> Tensor:
    """The part at `place` of a weight of `shape` [R, C] in fp32, from its E4M3 numbers and all scales."""
    cuts = [*place, *[slice(None)] * (2 - len(place))]
    rows, columns = (torch.arange(size)[cut] // BLOCK for size, cut in zip(shape, cuts, strict=True))
    return part.float() * scales.float()[rows][:, columns]
