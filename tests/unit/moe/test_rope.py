"""Rotary embeddings against products of complex numbers."""

from types import SimpleNamespace

import torch

from moe.rope import rotary_tables, rotate


def _rotary(size: int, theta: float) -> SimpleNamespace:
    """The keys of ModelConfig that rotary tables use."""
    return SimpleNamespace(rotary_dim=size, rope_theta=theta, rope_scaling=None)


def _complex(x: torch.Tensor) -> torch.Tensor:
    first, second = x.double().chunk(2, dim=-1)
    return torch.complex(first, second)


def test_rotation_is_a_complex_product() -> None:
    positions = torch.tensor([0, 1, 7, 4095, 0, 3])
    x = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0))
    frequencies = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    phases = torch.polar(torch.ones(6, 1, 4).double(), positions[:, None, None] * frequencies)
    turned = _complex(rotate(x, rotary_tables(positions, _rotary(8, 1e4), torch.float32)))
    # fp32 angles of some thousand radians are accurate to 2^-12
    torch.testing.assert_close(turned[:3], (_complex(x) * phases)[:3], rtol=0, atol=2e-6)
    torch.testing.assert_close(turned, _complex(x) * phases, rtol=0, atol=1e-3)


def test_scores_depend_on_distance_alone() -> None:
    query, key = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def score(at: int, of: int) -> float:
        tables = [
            rotary_tables(torch.tensor([position]), _rotary(16, 1e6), torch.float32) for position in (at, of)
        ]
        return (rotate(query, tables[0]) * rotate(key, tables[1])).sum().item()

    assert abs(score(5, 2) - score(105, 102)) < 1e-5
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


def test_tables_have_the_dtype_of_the_model_and_fp32_angles() -> None:
    positions = torch.tensor([40_959])
    exact = rotary_tables(positions, _rotary(128, 1e6), torch.float32)
    rounded = rotary_tables(positions, _rotary(128, 1e6), torch.bfloat16)
    assert all(torch.equal(r, e.bfloat16()) for r, e in zip(rounded, exact, strict=True))
