"""What a logged step measures in the optimizer step: correct, and without copies of whole tensors."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from moe.router import RouterStatistics
from trainer.engine.loss import LossShares, Totals
from trainer.engine.optimizer import KINDS, build_optimizer
from trainer.monitor import metrics
from trainer.monitor.metrics import OptimizerNorms, StepSums
from trainer.settings.config import RunConfig

SLICE = 2**12
ELEMENTS = 64 * SLICE + 17  # the last slice is shorter


class Weights(nn.Module):
    """A matrix that decays and a vector that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(1, ELEMENTS))
        self.vector = nn.Parameter(torch.randn(ELEMENTS))


@pytest.fixture
def config(run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(metrics, "SLICE", SLICE)
    torch.manual_seed(0)
    return run_config("experiment=demo", "deepspeed=zero1", "optimizer.max_grad_norm=0")


def step(optimizer: torch.optim.Optimizer, weights: nn.Module, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    for parameter in weights.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizer.step()


def test_the_update_is_what_has_changed(config: RunConfig) -> None:
    weights = Weights()
    optimizer = build_optimizer(weights, config.optimizer)
    norms = OptimizerNorms(optimizer, config, config.plan(1))
    for rate in (1e-2, 1e-3, 3e-3, 1e-2):
        old = [parameter.detach().double().clone() for parameter in weights.parameters()]
        norms.arm(torch.device("cpu"), histograms=True)
        step(optimizer, weights, rate)
        found = norms.describe(1.0)
        pairs = list(zip(old, weights.parameters(), strict=True))
        changed = sum((a - b.detach().double()).square().sum() for a, b in pairs).sqrt()
        before, gradient = (
            sum(x.double().square().sum() for x in tensors).sqrt().item()
            for tensors in (old, [parameter.grad for parameter in weights.parameters()])
        )
        assert found["update_ratio/other"] == pytest.approx(changed.item() / before, rel=1e-5)
        assert found["param_norm/other"] == pytest.approx(before, rel=1e-5)
        assert found["grad_norm/other"] == pytest.approx(gradient, rel=1e-5)
        assert sum(found["gradient_histogram"]["other"]) == 2 * ELEMENTS


def test_the_norm_of_a_clipped_gradient_is_that_before(config: RunConfig) -> None:
    """The optimizer sees gradients of norm 0.5; before they were clipped, their norm was 4 times that."""
    clipping = replace(config, optimizer=replace(config.optimizer, max_grad_norm=0.5))
    weights = Weights()
    optimizer = build_optimizer(weights, clipping.optimizer)
    norms = OptimizerNorms(optimizer, clipping, clipping.plan(1))
    norms.arm(torch.device("cpu"), histograms=False)
    for parameter in weights.parameters():
        parameter.grad = torch.ones_like(parameter) * 0.5 / (2 * ELEMENTS) ** 0.5
    optimizer.step()
    assert norms.describe(2.0)["grad_norm/other"] == pytest.approx(2.0, rel=1e-4)


def peak_bytes(run: Callable[[], None]) -> int:
    """The peak of the memory that `run` allocates, in addition to what was allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        highest = max(highest, allocated)
    return highest


def test_a_logged_step_takes_slices_of_memory_only(config: RunConfig) -> None:
    weights = Weights()
    optimizer = build_optimizer(weights, config.optimizer)
    norms = OptimizerNorms(optimizer, config, config.plan(1))
    step(optimizer, weights, 1e-3)
    plain = peak_bytes(lambda: optimizer.step())
    norms.arm(torch.device("cpu"), histograms=True)
    assert norms.squares.shape == (len(KINDS), 3)
    logged = peak_bytes(lambda: optimizer.step())
    assert logged - plain < 4 * 4 * SLICE, "4 slices, while the tensor has 64"


def test_what_a_step_says_of_its_experts() -> None:
    """By hand: 8 slots of 4 tokens over 4 experts, one layer balanced and one collapsed to two experts."""
    sums = StepSums.zeros(2, 4, torch.device("cpu"))
    sums.tokens_per_expert.copy_(torch.tensor([[2.0, 2.0, 2.0, 2.0], [6.0, 2.0, 0.0, 0.0]]))
    sums.balance.copy_(torch.tensor([1.0, 3.0]))
    sums.entropy.copy_(torch.tensor([8.0, 4.0]))
    sums.logit_range.copy_(torch.tensor([1.0, 5.0]))
    said = sums.describe(Totals(label_tokens=4, tokens=4, positions=4, stop=False, written=False))
    assert said["layers"]["max_violation"] == [0.0, 2.0], "6 slots where the mean is 2"
    assert (said["max_violation"], said["dead_experts"], said["balance_loss"]) == (2.0, 2.0, 2.0)
    assert (said["router_entropy"], said["logit_range"]) == (1.5, 5.0)
    assert said["layers"]["effective_experts"] == pytest.approx([1.0, 4 / 3**0.75 / 4])
    assert said["layers"]["dead_experts"] == [0, 2]


def test_a_step_sums_its_micro_batches() -> None:
    torch.manual_seed(0)
    batches = [
        (
            LossShares(torch.rand(()), torch.rand(2), torch.rand(2), torch.rand(2), torch.rand(())),
            RouterStatistics(torch.rand(2, 4), torch.rand(2, 4), torch.rand(2), torch.rand(2), torch.rand(2)),
        )
        for _ in range(3)
    ]
    sums = StepSums.zeros(2, 4, torch.device("cpu"))
    for shares, router in batches:
        sums.add(shares, router)
    for name in ("cross_entropy", "mtp", "balance", "z"):
        expected = torch.stack([getattr(shares, name) for shares, _ in batches]).sum(0)
        torch.testing.assert_close(getattr(sums, name), expected, msg=name)
    for name, of in (("entropy", "entropy_sums"), ("tokens_per_expert", "tokens_per_expert")):
        expected = torch.stack([getattr(router, of) for _, router in batches]).sum(0)
        torch.testing.assert_close(getattr(sums, name), expected, msg=name)
    assert torch.equal(sums.logit_range, torch.stack([router.logit_range for _, router in batches]).amax(0))
