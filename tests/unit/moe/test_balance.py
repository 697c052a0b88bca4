"""The balance loss of the global batch, by hand and by shares."""

import pytest
import torch

from moe.balance import Balance, balance_loss_share, expert_frequencies


def test_balanced_routing_costs_one_and_collapse_costs_the_ratio():
    tokens, experts, top_k = 64, 8, 2
    uniform = torch.full((1, experts), tokens * top_k / experts)
    probabilities = torch.full((1, experts), tokens / experts)
    assert balance_loss_share(expert_frequencies(uniform), probabilities, tokens).item() == 1.0
    collapsed = torch.zeros(1, experts)
    collapsed[0, :top_k] = tokens
    certain = collapsed / top_k
    assert balance_loss_share(expert_frequencies(collapsed), certain, tokens).item() == experts / top_k


def test_layers_are_not_pooled():
    """Two layers that collapsed to different experts would look balanced if they were pooled."""
    counts = torch.tensor([[8.0, 0.0], [0.0, 8.0]])
    losses = balance_loss_share(expert_frequencies(counts), counts, 8)
    assert losses.tolist() == [2.0, 2.0]


def test_shares_of_micro_batches_add_up_to_the_global_batch():
    torch.manual_seed(0)
    logits = torch.randn(30, 16, dtype=torch.float64)
    probabilities = logits.softmax(-1)
    chosen = probabilities.topk(4).indices
    counts = torch.stack([part.flatten().bincount(minlength=16) for part in chosen.split([5, 25])]).double()
    sums = torch.stack([part.sum(0) for part in probabilities.split([5, 25])])
    whole = balance_loss_share(expert_frequencies(counts.sum(0)), sums.sum(0), 30)

    def total(mode: str) -> torch.Tensor:
        balance = Balance(mode, num_layers=1, num_experts=16, micro_batches_per_step=2)
        if balance.counts_first:
            balance.count_first([c.unsqueeze(0) for c in counts])
        return sum(
            balance_loss_share(balance.frequencies(c.unsqueeze(0), 120), s.unsqueeze(0), 30)
            for c, s in zip(counts, sums, strict=True)
        )

    torch.testing.assert_close(total("exact"), whole.unsqueeze(0), rtol=1e-12, atol=0)
    assert abs(total("micro_batch") - whole) > 1e-3
    assert abs(total("buffer") - whole) > 1e-4


def test_the_prior_fills_what_has_not_been_seen():
    """With the same routing every step, the prior makes the first micro-batch's frequencies exact."""
    parts = [torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0, 12.0]])]
    balance = Balance("prior_buffer", num_layers=1, num_experts=2, micro_batches_per_step=2)
    first = [balance.frequencies(part, 16) for part in parts]
    assert first[0].tolist() == [[0.75, 0.25]]  # no prior yet: only the buffer
    assert first[1].tolist() == [[3 / 16, 13 / 16]]
    balance.end_step()
    second = balance.frequencies(parts[0], 16)
    torch.testing.assert_close(second, 0.25 * torch.tensor([[0.75, 0.25]]) + 0.75 * first[1])

    resumed = Balance("prior_buffer", num_layers=1, num_experts=2, micro_batches_per_step=2)
    balance.end_step()
    resumed.load_state(balance.state())
    assert torch.equal(resumed.frequencies(parts[1], 16), balance.frequencies(parts[1], 16))


@pytest.mark.parametrize("mode", ["exact", "buffer", "prior_buffer", "micro_batch"])
def test_the_selection_bias_moves_towards_the_idle(mode: str) -> None:
    balance = Balance(mode, num_layers=1, num_experts=4, micro_batches_per_step=1, bias_update_rate=0.5)
    for _ in range(2):
        balance.frequencies(torch.tensor([[8.0, 0.0, 4.0, 4.0]]), 16)
        balance.end_step()
    assert balance.bias.tolist() == [[-1.0, 1.0, 0.0, 0.0]]


def test_no_tokens_cost_nothing():
    assert balance_loss_share(expert_frequencies(torch.zeros(2, 4)), torch.zeros(2, 4), 1).tolist() == [
        0.0,
        0.0,
    ]


@pytest.mark.parametrize("mode", ["exact", "buffer", "prior_buffer", "micro_batch"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_forgets_the_counts_of_the_one_before(mode: str, micro_batches: int) -> None:
    """The second step's frequencies are those of a run that starts there with the state of a checkpoint."""

    def step(balance: Balance, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        counts = [torch.randint(0, 9, (2, 4), generator=generator).float() for _ in range(micro_batches)]
        if balance.counts_first:
            balance.count_first(counts)
        found = [balance.frequencies(part, 60) for part in counts]
        balance.end_step()
        return found

    def new() -> Balance:
        sizes = {"num_layers": 2, "num_experts": 4, "micro_batches_per_step": micro_batches}
        return Balance(mode, **sizes, bias_update_rate=0.5)

    run, resumed = new(), new()
    step(run, seed=0)
    resumed.load_state(run.state())
    for a, b in zip(step(run, seed=1), step(resumed, seed=1), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(run.bias, resumed.bias)
