"""Activations that the backward computes again instead of keeping them."""

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint

RECOMPUTE = ("none", "experts", "local", "full")


def call(function: Callable[..., Any], *arguments: Any, recompute: bool = True) -> Any:
    """function(*arguments); with `recompute` its activations are computed again in the backward."""
    if recompute:  # `function` draws nothing from the global random generators
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)
