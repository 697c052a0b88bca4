"""Matrix products on a CPU: fp32 stays fp32; without bf16 instructions, bf16 results are rounded once."""

import pytest
import torch
import torch.nn.functional as F

from trainer.engine import cpu_products
from trainer.engine.cpu_products import fast_products

CPU = torch.device("cpu")


def gradients(function, *operands):
    """The result of the function, and its gradients with respect to the operands."""
    operands = [x.detach().requires_grad_() for x in operands]
    result = function(*operands)
    weights = torch.linspace(-1, 1, result.numel()).bfloat16().to(result.dtype).view(result.shape)
    return [result, *torch.autograd.grad((result * weights).sum(), operands)]


def attend(query, key):
    return F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (F.linear, [(5, 7, 64), (96, 64)]),
        (F.linear, [(40, 64), (96, 64), (96,)]),
        (torch.bmm, [(3, 8, 64), (3, 64, 16)]),
        (attend, [(2, 4, 40, 16), (2, 2, 40, 16)]),
    ],
)
def test_bf16_products_are_rounded_once(monkeypatch, function, shapes):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    torch.manual_seed(0)
    operands = [torch.randn(shape).bfloat16() for shape in shapes]
    with fast_products(CPU, torch.bfloat16):
        results = gradients(function, *operands)
    for result, exact in zip(results, gradients(function, *(x.double() for x in operands)), strict=True):
        assert result.dtype == torch.bfloat16
        # half a unit in the last place of bf16 is 2^-9; attention also rounds between its products
        torch.testing.assert_close(result.double(), exact, rtol=2**-7, atol=2**-7 * exact.abs().max().item())


def test_products_into_a_given_tensor(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    a, b = torch.randn(2, 16, 16).bfloat16().unbind()
    out = torch.empty_like(a)
    with fast_products(CPU, torch.bfloat16):
        assert torch.mm(a, b, out=out) is out
    assert torch.equal(out, (a.float() @ b.float()).bfloat16())


def test_fp32_products_stay_fp32():
    before = torch.backends.mkldnn.matmul.fp32_precision
    a, b = torch.randn(2, 300, 300).unbind()
    with fast_products(CPU, torch.float32):
        error = (a @ b - a.double() @ b.double()).abs().max()
    assert error < 1e-4  # bf16 operands would give an error of 0.1
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_a_cpu_that_would_round_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu_products, "_exact", lambda: False)
    with fast_products(CPU, torch.float32):
        assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
