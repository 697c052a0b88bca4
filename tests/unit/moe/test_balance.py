"""The balance loss of the global batch, by hand and by shares."""

import torch

from moe.balance import GlobalFrequencies, balance_loss_share, expert_frequencies


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
    """Two collapsed layers on different experts would look balanced together."""
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

    exact = GlobalFrequencies("exact", micro_batches_per_step=2)
    exact.count_first(counts)
    shares = [balance_loss_share(exact.of(c), s, 30) for c, s in zip(counts, sums, strict=True)]
    torch.testing.assert_close(sum(shares), whole, rtol=1e-12, atol=0)

    naive = GlobalFrequencies("micro_batch", micro_batches_per_step=2)
    shares = [balance_loss_share(naive.of(c), s, 30) for c, s in zip(counts, sums, strict=True)]
    assert abs(sum(shares) - whole) > 1e-3


def test_no_tokens_cost_nothing():
    assert balance_loss_share(expert_frequencies(torch.zeros(2, 4)), torch.zeros(2, 4), 1).tolist() == [
        0.0,
        0.0,
    ]
