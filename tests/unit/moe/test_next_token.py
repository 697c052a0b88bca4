"""The choice of the next token against a slow version; its randomness; its borders."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from data_pipeline.permutation import MASK, mix
from moe import next_token
from moe.next_token import SamplingSettings, choose, uniforms


def settings(**changed: object) -> SamplingSettings:
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_new_tokens": 0, "max_new_tokens": 1}
    return SamplingSettings(**{**plain, "stop_ids": (), **changed})


def slow_uniform(key: int, count: int) -> float:
    return (mix((key + (count + 1) * 0x9E3779B97F4A7C15) & MASK) >> 11) / 2**53


def slow_choice(logits: Tensor, key: int, count: int, how: SamplingSettings) -> tuple[int, float]:
    """One token, by loops."""
    scores = [float(x) / (how.temperature or 1) for x in logits.float()]
    log_probs = torch.tensor(scores, dtype=torch.float64).log_softmax(0).tolist()
    allowed = [x for x in range(len(scores)) if count >= how.min_new_tokens or x not in how.stop_ids]
    if how.temperature == 0:
        token = max(allowed, key=lambda x: scores[x])
        return token, log_probs[token]
    probabilities = {x: p for x, p in enumerate(log_probs) if x in allowed}
    probabilities = {x: 2.718281828459045**p for x, p in probabilities.items()}
    if how.top_k or how.top_p < 1:
        ranked = sorted(allowed, key=lambda x: -scores[x])[: how.top_k or None]
        total, share, kept = sum(probabilities[x] for x in ranked), 0.0, []
        for x in ranked:
            if share >= how.top_p:
                break
            kept.append(x)
            share += probabilities[x] / total
        allowed = kept
    left = slow_uniform(key, count) * sum(probabilities[x] for x in allowed)
    for x in allowed:
        if left < probabilities[x]:
            break
        left -= probabilities[x]
    return x, log_probs[x]


CASES = [
    settings(),
    settings(temperature=0.0),
    settings(temperature=0.3),
    settings(temperature=2.0, top_k=5),
    settings(top_p=0.6),
    settings(temperature=1.5, top_p=0.9, top_k=40),
    settings(top_k=1),
    settings(top_k=5000, min_new_tokens=2, stop_ids=(3, 7)),
    settings(temperature=0.0, min_new_tokens=2, stop_ids=(3, 7)),
    settings(top_p=1e-9),
]


@pytest.mark.parametrize("how", CASES, ids=str)
@pytest.mark.parametrize("vocabulary", [9, 512, 1300])
def test_equals_the_slow_version(how: SamplingSettings, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, vocabulary, generator=generator)
    logits[:, 7] += 6  # a stop id that is probable
    keys = torch.randint(-(2**63), 2**63 - 1, (40,), generator=generator)
    counts = torch.arange(40) % 4
    tokens, log_probs = choose(logits, keys, counts, how)
    assert log_probs.dtype == torch.float32
    rows = zip(logits, keys.tolist(), counts.tolist(), tokens.tolist(), log_probs.tolist(), strict=True)
    for row, key, count, token, log_prob in rows:
        expected, of_expected = slow_choice(row, key, count, how)
        assert token == expected
        assert log_prob == pytest.approx(of_expected, abs=1e-5)


def test_the_random_numbers_are_splitmix64() -> None:
    """The first numbers of seed 1234567 are those of its authors' program."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found = uniforms(torch.full((3,), 1234567), torch.arange(3))
    assert found.tolist() == [(word >> 11) / 2**53 for word in published]
    keys = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    assert uniforms(keys, torch.tensor([0, 5, 9, 1])).tolist() == [
        slow_uniform(key % 2**64, count) for key, count in zip(keys.tolist(), (0, 5, 9, 1), strict=True)
    ]


@pytest.mark.parametrize("how", [settings(temperature=0.7), settings(top_k=4), settings(top_p=0.7)], ids=str)
def test_frequencies_are_the_probabilities(how: SamplingSettings) -> None:
    """Chi-square of 20,000 draws with fixed keys, over successive tokens of successive keys."""
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.0])
    keys, counts = torch.arange(200).repeat_interleave(100), torch.arange(100).repeat(200)
    tokens, _ = choose(logits.expand(20_000, -1), keys, counts, how)
    found = Counter(tokens.tolist())
    expected = (logits / how.temperature).double().softmax(0)
    if how.top_k or how.top_p < 1:
        count = how.top_k or int((expected.sort(descending=True).values.cumsum(0) < how.top_p).sum()) + 1
        kept = torch.zeros(8, dtype=torch.bool)
        kept[expected.argsort(descending=True)[:count]] = True
        expected = expected * kept / expected[kept].sum()
    assert {token for token, p in enumerate(expected) if p > 0} == set(found)
    square = sum((found[token] - 20_000 * p) ** 2 / (20_000 * p) for token, p in enumerate(expected) if p > 0)
    assert square < 24.3  # 0.999 of 7 degrees of freedom


@pytest.mark.parametrize("vocabulary", [5, 700, 2048])
@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53, 1.0])
def test_no_impossible_token_at_the_borders(
    vocabulary: int, uniform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if rounding makes the sums grow where nothing is, or end below the number."""
    monkeypatch.setattr(next_token, "uniforms", lambda keys, counts: torch.full((50,), uniform).double())
    generator = torch.Generator().manual_seed(0)
    logits = torch.full((50, vocabulary), -torch.inf)
    for row in logits:
        few = torch.randperm(vocabulary, generator=generator)[:3]
        row[few] = torch.randn(3, generator=generator)
    zeros = torch.zeros(50, dtype=torch.int64)
    for how in (settings(), settings(top_p=0.9), settings(top_k=2), settings(top_k=4)):
        tokens, log_probs = choose(logits, zeros, zeros, how)
        assert log_probs.isfinite().all()
        if uniform == 0 and how == settings():
            assert tokens.tolist() == logits.isfinite().int().argmax(-1).tolist()
        if how.top_k == 2:
            assert not (logits.argsort(descending=True)[:, 2] == tokens).any()


def test_rounded_sums_choose_no_weight_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.tensor([[0.0, 0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    for noise in (1e-12, -1e-12):  # in the sums of all places
        triangle = torch.ones(6, 6).double().triu() + noise
        monkeypatch.setattr(next_token, "_triangle", lambda *_, triangle=triangle: triangle)
        for target, place in ((0.0, 2), (0.2, 2), (0.25, 4), (0.5, 4), (1.0, 4)):
            found, _ = next_token._search(weights, torch.tensor([target]).double())
            assert weights[0, found] > 0
            assert target == 0.25 or found == place


def test_a_minimum_leaves_the_log_probabilities_alone() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    zero = torch.zeros(1, dtype=torch.int64)
    how = settings(temperature=0.0, min_new_tokens=1, stop_ids=(1,))
    token, log_prob = choose(logits, zero, zero, how)
    assert token.item() == 2
    assert log_prob.item() == pytest.approx(logits[0].log_softmax(0)[2].item())
    assert choose(logits, zero, zero + 1, how)[0].item() == 1


def test_top_p_that_is_met_exactly_needs_no_more_tokens() -> None:
    logits = torch.zeros(500, 4)
    keys = torch.arange(500)
    for top_p, possible in ((0.25, {0}), (0.5, {0, 1}), (0.51, {0, 1, 2})):  # of equal ones the first
        tokens, _ = choose(logits, keys, 0 * keys, settings(top_p=top_p))
        assert set(tokens.tolist()) == possible


def test_sixteen_bits_are_computed_in_fp32() -> None:
    logits = 3 * torch.randn(20, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    keys = torch.arange(20)
    expected = choose(logits.float(), keys, keys, settings(temperature=0.7))
    for value, other in zip(choose(logits, keys, keys, settings(temperature=0.7)), expected, strict=True):
        assert torch.equal(value, other)


def test_logits_that_are_not_numbers_choose_something() -> None:
    """A diverged run is told by its log-probabilities: a choice out of range would end it on a GPU."""
    zero = torch.zeros(1, dtype=torch.int64)
    token, log_prob = choose(torch.full((1, 5), torch.nan), zero, zero, settings())
    assert 0 <= token.item() < 5
    assert log_prob.isnan()
