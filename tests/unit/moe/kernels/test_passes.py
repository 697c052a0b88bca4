"""Which operators of torch touch large tensors: beside the kernels only products and gathers may."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from moe.cross_entropy import chunked_cross_entropy
from moe.experts import Experts
from moe.router import Router

FREE = {
    "empty",
    "empty_like",
    "new_empty",
    "detach",
    "view",
    "t",
    "transpose",
    "expand",
}  # no pass over memory


@pytest.fixture(autouse=True)
def _interpreter_is_not_counted(monkeypatch):
    """Triton's interpreter moves its operands with operators of torch."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def quiet(*args, **kwargs):
        with _disable_current_modes():
            return launch(*args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", quiet)


class Passes(TorchDispatchMode):
    """Names of the operators that write a tensor of at least `size` elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        written = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.numel() >= self.size]
        fresh = all(x is not y for x in written for y in tree_leaves((args, kwargs)) if isinstance(y, Tensor))
        if written and name not in FREE and not (fresh and func.is_view):
            self.names.append(name)
        return result


def test_experts(device):
    tokens, hidden, width, count = 24, 32, 16, 4
    experts = Experts(count, hidden, width, "grouped").to(device)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    x = torch.randn(tokens, hidden, device=device, requires_grad=True)
    ids = torch.rand(tokens, count, device=device).argsort(-1)[:, :2]
    weights = torch.rand(ids.shape, device=device, requires_grad=True)
    experts(x, weights, ids, 2 * tokens)  # compiles on a GPU
    with Passes(2 * tokens * width) as forward:
        y = experts(x, weights, ids, 2 * tokens)
    assert forward.names == ["index_select", "_grouped_mm", "_grouped_mm"]
    direction = torch.randn_like(y)
    with Passes(2 * tokens * width) as backward:
        torch.autograd.grad(y, [x, weights, *experts.parameters()], direction)
    down = ["index_select", "_grouped_mm", "_grouped_mm"]  # gradients of activation and weight
    assert backward.names == [*down, "index_select", "_grouped_mm", "_grouped_mm"]


def test_cross_entropy(device):
    tokens, hidden, vocabulary = 12, 8, 50
    states = torch.randn(tokens, hidden, device=device, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, device=device, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,), device=device)
    with Passes(tokens * vocabulary) as passes:
        chunked_cross_entropy(states, weight, labels)
    assert passes.names == ["mm"]  # the logits; the gradients are smaller


def test_router(device):
    router = Router(16, 12, 3, True).to(device)
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(40, 16, device=device, requires_grad=True)
    with Passes(40 * 12) as forward:
        weights, _, statistics = router(hidden)
    assert forward.names == ["mm"]
    loss = weights.sum() + statistics.z_sums
    with Passes(40 * 12) as backward:
        torch.autograd.grad(loss, [hidden, router.weight])
    assert backward.names == ["mm"]  # the gradient of the hidden states; that of the weight is smaller
