"""A step uses no operation that torch refuses on CUDA under `deterministic`; the replacements are right."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe.config import ModelConfig
from moe.model import CausalLM
from moe.router import TrainingRouting
from trainer.monitor.metrics import HISTOGRAM_LOG2, _histogram

aten = torch.ops.aten
# operations that throw on CUDA, from the page of torch.use_deterministic_algorithms; those a model could use
REFUSED = {aten.histc, aten.put, aten.put_, aten.kthvalue, aten.nll_loss_forward, aten.nll_loss2d_forward}


class _AsOnCuda(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind, given = func.overloadpacket, [*args, *(kwargs or {}).values()]
        refused = kind in REFUSED or func in (aten.median.dim, aten.nanmedian.dim)
        if kind in (aten.cumsum, aten.cumsum_):
            refused = given[0].is_floating_point() or torch.float32 in given
        if kind is aten.bincount:  # with weights
            refused = any(isinstance(value, Tensor) for value in given[1:])
        assert not refused, f"{func} has no deterministic form on CUDA"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_a_step_uses_no_operation_that_torch_refuses(
    config: ModelConfig,
    build: Callable[..., CausalLM],
    pack: Callable[[list[list[int]]], dict[str, Tensor]],
    backend: str,
) -> None:
    config = replace(config, num_nextn_predict_layers=1)
    model, batch = build(config, backend=backend), pack([[40, 30], [70]])
    labels = batch["input_ids"].roll(-1)
    with _AsOnCuda():
        routing = TrainingRouting(0.01, 1.25, ["a", "b"])
        output = model(**batch, labels=labels, routing=routing)
        assert output.cross_entropy_sum is not None
        total = output.cross_entropy_sum + output.mtp_cross_entropy_sum
        if output.router is not None:
            total = total + output.router.probability_sums.square().sum() + output.router.z_sums.sum()
        total.backward()
        for parameter in model.parameters():
            _histogram(parameter.grad)


def test_the_histogram_is_that_of_histc() -> None:
    first, last = HISTOGRAM_LOG2
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(1000, generator=generator) * torch.exp(8 * torch.randn(1000, generator=generator))
    gradient[:6] = torch.tensor([0.0, 1.0, -2.0, 2.0**-40, -(2.0**-41), 2.0**9])
    expected = torch.histc(gradient.abs().log2(), last - first, first, last)
    assert torch.equal(_histogram(gradient), expected.long())
    assert torch.equal(_histogram(gradient.bfloat16()), _histogram(gradient.bfloat16().float()))
