"""Each alarm is raised by what it is for, by nothing less, and not again too soon."""

import numpy as np
import pytest
import torch
from torch import nn

from trainer.monitor.alarms import Alarms, first_not_finite
from trainer.settings.config import AlarmsConfig

CONFIG = AlarmsConfig(
    loss_spike=8.0, effective_experts=0.25, data_stall=0.01, straggler=0.3, repeat_after_steps=100
)


def metrics(
    step: int, loss: float = 3.0, effective: float = 0.9, stall: float = 0.0, slow: float = 0.0
) -> dict:
    layers = {"effective_experts": [0.9, effective], "dead_experts": [0, 7]}
    return {
        "step": step,
        "loss": loss,
        "layers": layers,
        "stall_fraction": stall,
        "data_wait_seconds": stall,
        "slowest_rank": 1,
        "straggling": slow,
    }


def kinds(alarms: Alarms, *args, **values) -> list[str]:
    return [alarm.kind for alarm in alarms.check(metrics(*args, **values))]


@pytest.fixture
def alarms() -> Alarms:
    return Alarms(CONFIG, ["node-a", "node-b"], warmup_steps=10)


def falling(steps: int) -> np.ndarray:
    """A loss that falls as losses do, with noise."""
    noise = np.random.default_rng(0).normal(0, 0.03, steps)
    return 3 + 5 * np.exp(-np.arange(steps) / 30) + noise


def test_a_falling_loss_is_no_spike_and_a_jump_is(alarms):
    losses = falling(300)
    for step, loss in enumerate(losses):
        assert kinds(alarms, step, loss=loss) == []
    assert kinds(alarms, 300, loss=losses[-1] + 0.1) == [], "within the noise"
    assert kinds(alarms, 301, loss=losses[-1] + 1.0) == ["loss spike"]


def test_a_jump_on_the_way_down_is_a_spike_below_earlier_losses(alarms):
    noise = np.random.default_rng(0).normal(0, 0.01, 40)
    for step in range(40):
        assert kinds(alarms, step, loss=5 - 0.05 * step + noise[step]) == []
    assert kinds(alarms, 40, loss=3.5) == ["loss spike"]


def test_a_run_that_has_just_started_has_nothing_to_compare_with(alarms):
    for step in range(10):
        assert kinds(alarms, step, loss=3.0 + 100 * (step == 9)) == []


def test_collapse_that_lasts_names_the_layer(alarms):
    for step in range(11, 20):
        assert kinds(alarms, step, effective=0.2) == []
    (alarm,) = alarms.check(metrics(20, effective=0.2))
    assert alarm.kind == "expert collapse"
    assert "sparse layer 1 works as if it had 20% of its experts (7 without a token)" in alarm.text
    assert "model.router_aux_loss_coef" in alarm.text


def test_collapse_is_judged_after_warmup_and_again_only_after_a_recovery(alarms):
    for step in range(1, 20):
        assert kinds(alarms, step, effective=0.1) == [], "the steps of warmup do not count"
    assert kinds(alarms, 20, effective=0.1) == ["expert collapse"]
    for step in range(21, 500):
        assert kinds(alarms, step, effective=0.1) == []
    assert kinds(alarms, 500, effective=0.26) == [], "recovered"
    later = [kinds(alarms, step, effective=0.1) for step in range(501, 511)]
    assert later == [*[[]] * 9, ["expert collapse"]]


def test_each_layer_that_collapses_is_named_once(alarms):
    def layers(step: int, *effective: float) -> list[str]:
        values = {"effective_experts": list(effective), "dead_experts": [0] * len(effective)}
        return [alarm.text[:14] for alarm in alarms.check(metrics(step) | {"layers": values})]

    for step in range(11, 32):  # two layers by turns: neither has collapsed
        assert layers(step, 0.1 + 0.5 * (step % 2), 0.6 - 0.5 * (step % 2)) == []
    for step in range(32, 41):
        assert layers(step, 0.1, 0.9) == [], step
    assert layers(41, 0.1, 0.1) == ["sparse layer 0"]
    for step in range(42, 50):
        assert layers(step, 0.1, 0.1) == [], step
    assert layers(50, 0.1, 0.1) == ["sparse layer 1"], "also while the other one lasts"


def test_a_data_stall_says_how_long(alarms):
    assert kinds(alarms, 1, stall=0.01) == []
    (alarm,) = alarms.check(metrics(2, stall=0.02))
    assert alarm.kind == "data stall"
    assert "2.0% of a step" in alarm.text


def test_a_straggler_is_one_rank_three_times_running_named_by_host(alarms):
    assert kinds(alarms, 1, slow=0.5) == kinds(alarms, 2, slow=0.5) == []
    assert kinds(alarms, 3, slow=0.1) == [], "in between it kept up"
    assert kinds(alarms, 4, slow=0.5) == kinds(alarms, 5, slow=0.5) == []
    (alarm,) = alarms.check(metrics(6, slow=0.5))
    assert alarm.kind == "straggler"
    assert "rank 1 on node-b computes 50% longer" in alarm.text


def test_the_same_alarm_waits_and_another_does_not(alarms):
    assert kinds(alarms, 11, stall=0.5, effective=0.1) == ["data stall"]
    for step in range(12, 20):
        assert kinds(alarms, step, stall=0.5, effective=0.1) == []
    assert kinds(alarms, 20, stall=0.5, effective=0.1) == ["expert collapse"]
    assert kinds(alarms, 110, stall=0.5) == []
    assert kinds(alarms, 111, stall=0.5) == ["data stall"]


def test_a_dense_model_has_no_experts_to_collapse(alarms):
    dense = metrics(1)
    del dense["layers"]
    assert alarms.check(dense) == []


class Small(nn.Module):
    """Two of the kinds, the attention nearer to the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Linear(2, 2)
        self.self_attn = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.self_attn(self.embed_tokens(x))


def test_where_a_gradient_stops_being_finite():
    torch.manual_seed(0)
    model = Small()
    with first_not_finite(model) as first:
        model(torch.ones(2)).sum().backward()
    assert first == []
    with first_not_finite(model) as first:
        hidden = model.embed_tokens(torch.ones(2))
        hidden.register_hook(lambda gradient: gradient * float("inf"))
        model.self_attn(hidden).sum().backward()
    assert len(first) == 1
    assert "the gradient of the embedding (embed_tokens." in first[0]
    with torch.no_grad():
        model.self_attn.weight[0, 0] = float("nan")
    with first_not_finite(model) as first:
        pass
    assert first == ["the weights of the attention (self_attn.weight)"]


def rewarded(
    alarms: Alarms,
    step: int,
    reward: float = 0.5,
    tokens: float = 100.0,
    flat: float = 0.2,
    failed: float = 0.0,
) -> set:
    of_rewards = {"reward": reward, "completion_tokens": tokens, "flat_groups": flat, "truncated": 0.0}
    of_rewards["failed_checks"] = failed
    return {alarm.kind for alarm in alarms.check(metrics(step, loss=(-1) ** step * 0.01) | of_rewards)}


def test_a_policy_loss_is_never_a_spike(alarms):
    for step in range(30):
        assert rewarded(alarms, step) == set()
    assert rewarded(alarms, 30, reward=0.5) == set()
    jump = {"reward": 0.5, "completion_tokens": 100.0, "flat_groups": 0.0, "truncated": 0.0}
    jump["failed_checks"] = 0.0
    assert [alarm.kind for alarm in alarms.check(metrics(31, loss=50.0) | jump)] == []


def test_rewards_that_collapse(alarms):
    for step in range(12):
        assert rewarded(alarms, step, reward=0.1 + 0.05 * step) == set()
    assert rewarded(alarms, 12, reward=0.0) == set(), "one bad step is none"
    raised = [step for step in range(13, 40) if "reward collapse" in rewarded(alarms, step, reward=0.0)]
    best = sum(0.1 + 0.05 * step for step in range(2, 12)) / 10
    low = next(n for n in range(10) if sum(0.1 + 0.05 * s for s in range(2 + n, 12)) / 10 < best / 2)
    assert raised == [11 + low], "once, when the mean of ten steps is below half of the best"


def test_few_rewards_are_no_collapse(alarms):
    """Before ten steps there is no mean to compare with."""
    for step, reward in enumerate([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]):
        assert rewarded(alarms, step, reward=reward) == set()


def test_lengths_that_run_away(alarms):
    for step in range(30):
        assert rewarded(alarms, step, tokens=100 + 3 * step) == set(), "slow growth"
    for step in range(30, 39):
        rewarded(alarms, step, tokens=500)
    assert rewarded(alarms, 39, tokens=500) == set(), "raised already, and not again so soon"
    assert "lengths" in alarms._raised


def test_checks_that_fail(alarms):
    """Prompts of another difficulty, as for groups without signal, would not help."""
    assert rewarded(alarms, 0, failed=0.25) == set()
    assert rewarded(alarms, 1, failed=0.26) == {"failed checks"}
    for step in range(2, 20):
        assert rewarded(alarms, step, flat=1.0, failed=1.0) == set()


def test_groups_without_signal(alarms):
    for step in range(4):
        assert rewarded(alarms, step, flat=1.0) == set()
    assert rewarded(alarms, 4, flat=0.9) == set(), "counts anew"
    for step in range(5, 9):
        assert rewarded(alarms, step, flat=1.0) == set()
    assert rewarded(alarms, 9, flat=1.0) == {"no signal"}
