import pytest
import torch

from moe import trial
from moe.kernels import cross_entropy, experts, rotary, router, sums, support


@pytest.fixture
def attempt(device, monkeypatch):
    """The trial, as in a new process."""
    monkeypatch.setattr(support, "_on", True)
    trial.kernels_obstacle.cache_clear()
    yield lambda: trial.kernels_obstacle(device, torch.float32)
    trial.kernels_obstacle.cache_clear()


def test_kernels_that_are_right_are_used(device, attempt):
    assert attempt() is None
    assert support.run_on(torch.ones(1, device=device))


def scaled(function):
    """The function with its first result doubled."""

    def wrong(*args, **kwargs):
        result = function(*args, **kwargs)
        return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result

    return wrong


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (experts, "activate"),
        (experts, "activate_backward"),
        (experts, "combine"),
        (cross_entropy, "loss_and_gradient"),
        (router, "route"),
        (rotary, "normalize_and_rotate"),
    ],
)
def test_a_wrong_kernel_turns_all_off(device, attempt, monkeypatch, module, name):
    monkeypatch.setattr(module, name, scaled(getattr(module, name)))
    assert "the Triton kernels fail here (relative errors" in attempt()
    assert not support.run_on(torch.ones(1, device=device))


def test_a_kernel_that_raises_or_does_nothing_turns_all_off(device, attempt, monkeypatch):
    monkeypatch.setattr(sums, "accumulate", lambda total, gradient, first: None)
    assert "relative errors" in attempt()

    def broken(*_):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(support, "_on", True)
    trial.kernels_obstacle.cache_clear()
    monkeypatch.setattr(sums, "accumulate", broken)
    assert "RuntimeError: PassManager::run failed" in attempt()
    assert not support.run_on(torch.ones(1, device=device))
