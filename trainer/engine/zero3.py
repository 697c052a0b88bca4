"""How DeepSpeed's ZeRO-3 gathers the weights that it has partitioned."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
from torch import nn


def in_one_order(model: nn.Module) -> None:
    """Make all ranks gather parameters in the same order.

    DeepSpeed prefetches a Python set of parameters, whose order differs between processes, one group of ranks
    at a time. If two ranks start the collectives of two groups in different orders, they can deadlock.
    """
    parameter: Any
    for parameter in model.parameters():
        gather = parameter.all_gather_coalesced

        def ordered(parameters: Iterable[Any], *args: Any, _gather: Any = gather, **kwargs: Any) -> Any:
            return _gather(sorted(parameters, key=lambda one: one.ds_id), *args, **kwargs)

        parameter.all_gather_coalesced = ordered


@contextmanager
def all_gathered(engine: Any) -> Iterator[None]:
    """Inside, all parameters of a DeepSpeed engine are whole; experts: the slice of this rank.

    Without this, every forward gathers each layer, also one that generates a single token. The hooks that
    would partition a layer after its forward are taken off meanwhile.
    """
    offload = engine.optimizer.parameter_offload
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            yield
    finally:
        offload._register_deepspeed_module(offload.module, [offload.module.ds_id])
