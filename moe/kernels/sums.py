"""The fp32 sum of gradients in 16 bits."""
# n elements

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # elements of one program


def accumulate(total: Tensor, gradient: Tensor, first: bool) -> None:
    """Add `gradient` to `total`, both of n elements and contiguous, or write it there if it is the `first`.

    Its oracle is `moe.sums.accumulate`: torch's kernels for two dtypes do not load several elements at once.
    """
    if n := gradient.numel():
        _accumulate[(triton.cdiv(n, _BLOCK),)](total, gradient.contiguous(), n, FIRST=first, BLOCK=_BLOCK)


@triton.jit
def _accumulate(total, gradient, n, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    result = tl.load(gradient + at, mask=at < n).to(tl.float32)
    if not FIRST:
        result += tl.load(total + at, mask=at < n)
    tl.store(total + at, result, mask=at < n)
