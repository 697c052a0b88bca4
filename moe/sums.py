"""Sums in fp32 of gradients in 16 bits."""

from torch import Tensor

from moe.kernels.support import run_on


def accumulate(total: Tensor, gradient: Tensor, first: bool) -> None:
    """Add a gradient to its sum, or write it there if it is the `first`; equal numbers of elements."""
    if run_on(gradient):
        from moe.kernels import sums

        sums.accumulate(total, gradient, first)
    else:
        total = total.view_as(gradient)
        (total.copy_ if first else total.add_)(gradient)
