from itertools import accumulate

import pytest
import torch

from moe import attention
from moe.attention import Attention
from moe.documents import Documents
from moe.inputs import LayerInputs
from moe.kernels import rotary
from moe.rope import rotary_tables, rotate

EPS = 1e-6


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several programs, of several steps, already for a few tokens."""
    monkeypatch.setattr(rotary, "_VALUES", 64)
    monkeypatch.setattr(rotary, "_STEPS", 3)


def inputs(tokens, heads, width, rotated, dtype, device, gated=False):
    torch.manual_seed(tokens * 1000 + heads)
    x = torch.randn(tokens, heads, width * (2 if gated else 1), device=device).to(dtype)
    x = x.chunk(2, dim=-1)[0] if gated else x  # strided: query and gate side by side
    weight = torch.randn(width, device=device).to(dtype)
    angles = 6 * torch.rand(tokens, 1, rotated // 2, device=device)
    return x, weight, (angles.cos().to(dtype), angles.sin().to(dtype))


def expected_of(x, weight, tables, center):
    normed = torch.nn.functional.rms_norm(x, x.shape[-1:], center + weight, EPS)
    return rotate(normed, tables)


def results(function, x, weight, direction):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = function(x, weight)
    return [out, *torch.autograd.grad(out, (x, weight), direction)]


SHAPES = [  # T, N, C, R, gated
    (1, 1, 8, 8, False),
    (5, 3, 8, 8, False),
    (7, 6, 12, 4, True),
    (50, 2, 8, 8, True),
    (31, 5, 24, 12, False),
    (0, 2, 8, 8, False),
]


@pytest.mark.parametrize(("tokens", "heads", "width", "rotated", "gated"), SHAPES)
@pytest.mark.parametrize("center", [0.0, 1.0])
def test_norm_and_rotation(device, tokens, heads, width, rotated, gated, center):
    x, weight, tables = inputs(tokens, heads, width, rotated, torch.float32, device, gated)
    direction = torch.randn(tokens, heads, width, device=device)
    mine = lambda x, weight: rotary.normalize_and_rotate(x, weight, tables, EPS, center)  # noqa: E731
    found = results(mine, x, weight, direction)
    oracle = lambda x, weight: expected_of(x, weight, tables, center)  # noqa: E731
    assert found[0].is_contiguous()
    for one, other in zip(found, results(oracle, x, weight, direction), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strided", ["tokens first", "values last"])
def test_gradient_of_any_layout(device, strided):
    x, weight, tables = inputs(9, 3, 8, 4, torch.float32, device)
    order = (1, 0, 2) if strided == "tokens first" else (2, 0, 1)
    direction = torch.randn(9, 3, 8, device=device)
    moved = direction.permute(order).contiguous()
    moved = moved.permute(sorted(range(3), key=order.__getitem__))
    assert not moved.is_contiguous()
    mine = lambda x, weight: rotary.normalize_and_rotate(x, weight, tables, EPS, 0.0)  # noqa: E731
    pairs = zip(results(mine, x, weight, direction), results(mine, x, weight, moved), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


# Triton's interpreter truncates to bf16, where a GPU rounds: one spacing
@pytest.mark.parametrize(("dtype", "spacing"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("center", [0.0, 1.0])
def test_sixteen_bits_are_rounded_once(device, dtype, spacing, center):
    x, weight, tables = inputs(40, 3, 16, 8, dtype, device, gated=True)
    direction = torch.randn(40, 3, 16, device=device).to(dtype)
    mine = lambda x, weight: rotary.normalize_and_rotate(x, weight, tables, EPS, center)  # noqa: E731
    wide = [part.float() for part in tables]
    oracle = lambda x, weight: expected_of(x, weight, wide, center)  # noqa: E731
    found = results(mine, x, weight, direction)
    expected = results(oracle, x.float(), weight.float(), direction.float())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), other, rtol=spacing, atol=1e-5)


def test_attention_with_and_without_the_kernel(device, config, monkeypatch):
    torch.manual_seed(0)
    module = Attention(config, 0).to(device)
    for weight in (module.q_norm.weight, module.k_norm.weight):
        weight.data += torch.randn_like(weight)
    lengths = (7, 4, 9)
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    documents = Documents(borders, lengths)
    tables = rotary_tables(documents.position, config, torch.float32)
    hidden = torch.randn(2, 10, config.hidden_size, device=device, requires_grad=True)
    direction = torch.randn(2, 10, config.hidden_size, device=device)
    found = []
    for kernels in (True, False):
        monkeypatch.setattr(attention, "run_on", lambda x, kernels=kernels: kernels)
        out = module(hidden, LayerInputs(tables, documents))
        found.append([out, *torch.autograd.grad(out, (hidden, *module.parameters()), direction)])
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
