"""The terms of a micro-batch's loss as shares of the global batch, from numbers that are easy to follow."""

import pytest
import torch

from moe.model import ModelOutput
from moe.router import RouterStatistics
from trainer.engine.loss import LossShares, Totals, build_balance
from trainer.stages.supervised import Supervised

TOTALS = Totals(label_tokens=8, tokens=10, positions=12, stop=False, written=False)  # of the global batch
# two layers of two experts; of three of the ten tokens
ROUTER = RouterStatistics(
    tokens_per_expert=torch.tensor([[3.0, 0.0], [1.0, 2.0]]),
    probability_sums=torch.tensor([[2.0, 1.0], [1.5, 1.5]]),
    z_sums=torch.tensor([5.0, 20.0]),
    entropy_sums=torch.zeros(2),
    logit_range=torch.zeros(2),
)
FREQUENCIES = torch.tensor([[0.5, 0.5], [0.25, 0.75]])  # of the global batch


def output(router: RouterStatistics | None = ROUTER, ahead: float | None = 4.0) -> ModelOutput:
    return ModelOutput(None, torch.tensor(16.0), router, None if ahead is None else torch.tensor(ahead))


def shares(
    router: RouterStatistics | None = ROUTER, totals: Totals = TOTALS, **given: float | None
) -> LossShares:
    frequencies = None if router is None else FREQUENCIES
    return Supervised.loss_shares(None, output(router, **given), frequencies, totals)


def test_each_term_is_divided_by_its_total() -> None:
    found = shares()
    assert found.cross_entropy == 16 / 8
    assert found.mtp == 4 / 8
    assert found.z.tolist() == [0.5, 2.0]
    # E sum f_e S_e / T with E = 2, T = 10
    torch.testing.assert_close(found.balance, torch.tensor([2 * 1.5 / 10, 2 * 1.5 / 10]))
    torch.testing.assert_close(found.local_balance, torch.tensor([2 * 2.0 / 10, 2 * 1.5 / 10]))


def test_a_batch_without_tokens_costs_nothing() -> None:
    sums = {key: value for key, value in ROUTER._asdict().items() if value is not None}
    nothing = ROUTER._replace(**{key: 0 * value for key, value in sums.items()})
    empty = ModelOutput(None, torch.tensor(0.0), nothing, torch.tensor(0.0))
    found = Supervised.loss_shares(None, empty, FREQUENCIES, Totals(0, 0, 8, False, False))
    for value in vars(found).values():
        assert not value.any()


def test_a_dense_model_has_cross_entropy_alone() -> None:
    found = shares(router=None, ahead=None)
    assert found.cross_entropy == 2
    assert found.mtp == 0
    assert found.balance.shape == found.local_balance.shape == found.z.shape == (0,)


@pytest.mark.parametrize("micro_weight", [0.0, 0.25])
def test_the_loss_is_the_weighted_sum_over_layers(run_config, micro_weight: float) -> None:
    config = run_config(
        "model.router_aux_loss_coef=0.5",
        f"balance.micro_weight={micro_weight}",
        "balance.z_loss_coef=0.125",
        "mtp_loss_scaling_factor=0.75",
    )
    by_hand = 2.0 + 0.75 * 0.5 + 0.5 * (0.6 + micro_weight * 0.7) + 0.125 * 2.5
    assert shares().total(config).item() == pytest.approx(by_hand, rel=1e-6)
    assert shares(router=None, ahead=None).total(config).item() == 2.0


def test_the_balance_is_that_of_the_configuration(run_config) -> None:
    for mode in ("exact", "micro_batch"):
        config = run_config(f"balance.mode={mode}", "balance.bias_update_rate=0.5", "micro_batch_size=1")
        balance = build_balance(config, config.plan(1), torch.device("cpu"))
        assert balance.counts_first == (mode == "exact")
        counts = torch.zeros(config.model.num_moe_layers, config.model.num_experts)
        counts[:, 0] = 1
        balance.frequencies(counts, 1)
        if mode == "micro_batch":
            balance.end_step()
            assert balance.bias[0, 0] == -0.5
    config = run_config("balance.bias_update_rate=0")
    assert build_balance(config, config.plan(1), torch.device("cpu")).bias is None
