"""The policy loss against slow versions in fp64, written as loops over completions and tokens."""

import math
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from data_pipeline.loader import Batch
from trainer.engine.policy import (
    SUMS,
    PolicyBatch,
    PolicyTerms,
    flat_groups,
    group_advantages,
    overlong_penalty,
    policy_loss,
    token_weights,
)
from trainer.settings.rl import RLConfig, SamplingConfig

SEQ_LEN, MAX_NEW_TOKENS = 16, 9
# rows of (prompt tokens, completion tokens) of each document; what is left of a row is padding
ROWS = [[(2, 5), (1, 1), (3, 2)], [(4, 9)], [(1, 3), (2, 4), (2, 3), (1, 0)], [(6, 0), (3, 7)]]
# two prompts with four completions each, in the order of the rows
REWARDS = torch.tensor([[1.0, 0.0, 0.25, 1.0], [0.0, -0.5, 0.7, 0.1]], dtype=torch.float64)
CHOICES: dict[str, tuple[Any, ...]] = {
    "advantage": ("deviation", "mean"),
    "loss_sum": ("token", "sequence", "constant"),
    "ratio": ("token", "sequence"),
    "kl_coef": (0.0, 0.3),
}
COMBINATIONS = [dict(zip(CHOICES, values, strict=True)) for values in product(*CHOICES.values())]
LEFT_OUT = [(), (1, 4)]  # completions


class Completion(NamedTuple):
    """Where the labels of a completion are: positions first ... first + length - 1 of a row."""

    row: int
    first: int
    length: int


def places() -> list[Completion]:
    """The completions with a label. The first label of a completion is at the last token of its prompt."""
    found = []
    for row, documents in enumerate(ROWS):
        start = 0
        for prompt, completion in documents:
            if completion:
                found.append(Completion(row, start + prompt - 1, completion))
            start += prompt + completion
    return found


COMPLETIONS = places()
LENGTHS = [completion.length for completion in COMPLETIONS]


def rl_config(**changed: Any) -> RLConfig:
    sampling = SamplingConfig(0.6, 1.0, 0, 0, MAX_NEW_TOKENS, 8, False, "none")
    plain = RLConfig(
        4, 1, 8, sampling, {}, "mean", "token", "token", 0.1, 0.15, "keep", "learn", 0, 0.0, None
    )
    return replace(plain, **changed)


def drawn(seed: int, scale: float, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(len(ROWS), SEQ_LEN, generator=generator, dtype=dtype)


class Case:
    """The micro-batch of all rows and the log-probabilities of its labels, as the product makes them."""

    def __init__(self, config: RLConfig, left_out: tuple[int, ...] = ()) -> None:
        self.config, self.left_out = config, left_out
        shape = (len(ROWS), SEQ_LEN)
        labels = torch.full(shape, -100)
        for row, first, length in COMPLETIONS:
            labels[row, first : first + length] = 1
        borders = [0]
        for row, documents in enumerate(ROWS):
            for prompt, completion in documents:
                borders.append(borders[-1] + prompt + completion)
            borders.append((row + 1) * SEQ_LEN)
        cu_seqlens = torch.tensor(borders, dtype=torch.int32).unique()  # a full row has no padding
        ids, mask = torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)
        batch = Batch.of(ids, labels, ids, cu_seqlens, mask, tuple(range(len(ROWS))))
        has_label = labels != -100
        self.log_probs = (drawn(0, 0.2) - 2) * has_label
        self.entropies = drawn(1, 1.0).abs() * has_label
        learned = torch.tensor([number not in left_out for number in range(len(COMPLETIONS))])
        per_completion = token_weights(torch.tensor(LENGTHS), learned, config.loss_sum, MAX_NEW_TOKENS)
        advantages, weights = torch.zeros(2, *shape, dtype=torch.float64)
        of_completions = group_advantages(REWARDS, config.advantage).flatten()
        for number, (row, first, length) in enumerate(COMPLETIONS):
            advantages[row, first : first + length] = of_completions[number]
            weights[row, first : first + length] = per_completion[number]
        reference = drawn(2, 0.4) - 2 if config.kl_coef else None
        self.batch = PolicyBatch(
            **vars(batch),
            sampled_log_probs=self.log_probs + drawn(7, 0.3),
            reference_log_probs=reference,
            advantages=advantages,
            weights=weights,
            temperature=config.sampling.temperature,
        )

    def found(self, dtype: torch.dtype = torch.float64) -> tuple[PolicyTerms, Tensor]:
        """The terms, and the gradient of the loss by the log-probabilities [B,S]."""
        batch = self.batch._each(lambda x: x.to(dtype) if x.is_floating_point() else x)
        log_probs = self.log_probs.to(dtype).requires_grad_()
        terms = policy_loss(log_probs, self.entropies.to(dtype), batch, self.config)
        return terms, torch.autograd.grad(terms.loss, log_probs)[0]

    def slow(self) -> tuple[Tensor, dict[str, float], Tensor]:
        """The same from the papers: the loss, the sums of SUMS, the gradient."""
        config, batch = self.config, self.batch
        low, high = 1 - config.clip_low, 1 + config.clip_high
        log_probs = self.log_probs.clone().requires_grad_()
        kept = [number for number in range(len(COMPLETIONS)) if number not in self.left_out]
        loss, sums = torch.zeros((), dtype=torch.float64), dict.fromkeys(SUMS, 0.0)
        for number in kept:
            row, first, length = COMPLETIONS[number]
            share = {
                "token": 1 / sum(LENGTHS[other] for other in kept),
                "sequence": 1 / len(kept) / length,
                "constant": 1 / len(kept) / MAX_NEW_TOKENS,
            }[config.loss_sum]
            advantage = slow_advantage(number, config.advantage)
            positions = range(first, first + length)
            log_ratios = [log_probs[row, t] - batch.sampled_log_probs[row, t] for t in positions]
            for t, log_ratio in zip(positions, log_ratios, strict=True):
                ratio = log_ratio.exp()
                if config.ratio == "sequence":
                    ratio = (sum(log_ratios) / length).exp()
                clipped = min(max(ratio, ratio.new_tensor(low)), ratio.new_tensor(high))
                loss = loss - share * min(ratio * advantage, clipped * advantage)
                if batch.reference_log_probs is not None:
                    toward = batch.reference_log_probs[row, t] - log_probs[row, t]
                    loss = loss + share * config.kl_coef * (toward.exp() - toward - 1)
                    sums["reference_kl"] += (toward.exp() - toward - 1).item()
                sums["tokens"] += 1
                sums["clipped_low"] += float(ratio < low and advantage < 0)
                sums["clipped_high"] += float(ratio > high and advantage > 0)
                sums["ratio"] += ratio.item()
                sums["sampling_kl"] += (log_ratio.exp() - log_ratio - 1).item()
                sums["entropy"] += self.entropies[row, t].item()
        return loss.detach(), sums, torch.autograd.grad(loss, log_probs)[0]


def slow_advantage(number: int, how: str) -> float:
    group = REWARDS[number // 4].tolist()
    mean = sum(group) / 4
    if how == "mean":
        return group[number % 4] - mean
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in group) / 3)  # of a sample: 4 - 1
    return (group[number % 4] - mean) / (deviation + 1e-4)


def test_the_rows_have_what_the_tests_need() -> None:
    assert len(COMPLETIONS) == REWARDS.numel()
    assert 1 in LENGTHS
    assert len(set(LENGTHS)) > 4
    for ratio in CHOICES["ratio"]:
        _, sums, _ = Case(rl_config(ratio=ratio)).slow()
        assert min(sums["clipped_low"], sums["clipped_high"]) > 0


@pytest.mark.parametrize("left_out", LEFT_OUT)
@pytest.mark.parametrize("choices", COMBINATIONS, ids=lambda choices: "-".join(map(str, choices.values())))
def test_every_combination_equals_the_slow_version(choices: dict, left_out: tuple[int, ...]) -> None:
    case = Case(rl_config(**choices), left_out)
    loss, sums, gradient = case.slow()
    terms, found = case.found()
    torch.testing.assert_close(terms.loss.detach(), loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-14)
    assert dict(zip(SUMS, terms.sums.tolist(), strict=True)) == pytest.approx(sums, rel=1e-12)
    assert not terms.sums.requires_grad
    single, in_single = case.found(torch.float32)
    assert single.loss.dtype == torch.float32
    torch.testing.assert_close(single.loss.detach().double(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(in_single.double(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("choices", COMBINATIONS, ids=lambda choices: "-".join(map(str, choices.values())))
def test_the_loss_is_that_of_trl(choices: dict) -> None:
    """The lines of TRL 1.16, trl/trainer/grpo_trainer.py, for completions [N, longest] that are padded.

    From `_generate_and_score_completions`: advantages; from `_compute_loss`: all else. Its names of a
    `loss_sum` are grpo (sequence), dapo (token) and dr_grpo (constant).
    """
    case = Case(rl_config(**choices))
    config, batch, size = case.config, case.batch, (len(COMPLETIONS), max(LENGTHS))
    log_probs = case.log_probs.clone().requires_grad_()
    padded = [torch.zeros(size, dtype=torch.float64) for _ in range(4)]
    mask, per_token_logps, old_per_token_logps, ref_per_token_logps = padded
    for number, (row, first, length) in enumerate(COMPLETIONS):
        here = row, slice(first, first + length)
        mask[number, :length] = 1
        per_token_logps[number, :length] = log_probs[here]
        old_per_token_logps[number, :length] = batch.sampled_log_probs[here]
        if batch.reference_log_probs is not None:
            ref_per_token_logps[number, :length] = batch.reference_log_probs[here]
    rewards, num_generations = REWARDS.flatten(), REWARDS.shape[1]
    advantages = rewards - REWARDS.mean(dim=1).repeat_interleave(num_generations)
    if config.advantage == "deviation":
        std_rewards = REWARDS.std(dim=1).repeat_interleave(num_generations)
        advantages = advantages / (std_rewards + 1e-4)
    advantages = advantages.unsqueeze(1)

    log_ratio = per_token_logps - old_per_token_logps
    log_importance_weights = log_ratio
    if config.ratio == "sequence":
        log_importance_weights = (log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
        log_importance_weights = log_importance_weights.unsqueeze(-1)
    coef_1 = torch.exp(log_importance_weights)
    coef_2 = torch.clamp(coef_1, 1 - config.clip_low, 1 + config.clip_high)
    per_token_loss = -torch.min(coef_1 * advantages, coef_2 * advantages)
    per_token_kl = (
        torch.exp(ref_per_token_logps - per_token_logps) - (ref_per_token_logps - per_token_logps) - 1
    )
    per_token_loss = per_token_loss + config.kl_coef * per_token_kl
    loss = {
        "sequence": ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean(),
        "token": (per_token_loss * mask).sum() / mask.sum(),
        "constant": (per_token_loss * mask).sum() / (len(mask) * MAX_NEW_TOKENS),
    }[config.loss_sum]
    is_low_clipped = (coef_1 < 1 - config.clip_low) & (advantages < 0)
    is_high_clipped = (coef_1 > 1 + config.clip_high) & (advantages > 0)

    terms, gradient = case.found()
    torch.testing.assert_close(terms.loss, loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, log_probs)[0], rtol=1e-12, atol=1e-14)
    sums = dict(zip(SUMS, terms.sums.tolist(), strict=True))
    assert sums["clipped_low"] == (is_low_clipped * mask).sum()
    assert sums["clipped_high"] == (is_high_clipped * mask).sum()
    if batch.reference_log_probs is not None:
        assert sums["reference_kl"] == pytest.approx((per_token_kl * mask).sum().item(), rel=1e-12)


@pytest.mark.parametrize("cut", [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[3, 0, 2], [1]]], ids=str)
@pytest.mark.parametrize("choices", COMBINATIONS, ids=lambda choices: "-".join(map(str, choices.values())))
def test_shares_add_up_however_the_batch_is_cut(choices: dict, cut: list[list[int]]) -> None:
    case = Case(rl_config(**choices), left_out=(1, 4))
    whole, gradient = case.found()
    loss, sums, found = (
        torch.zeros((), dtype=torch.float64),
        torch.zeros(len(SUMS)),
        torch.zeros_like(gradient),
    )
    borders = case.batch.cu_seqlens.tolist()
    for rows in cut:
        pieces = [
            [border - row * SEQ_LEN for border in borders if row * SEQ_LEN < border <= (row + 1) * SEQ_LEN]
            for row in rows
        ]
        inside = [border + place * SEQ_LEN for place, piece in enumerate(pieces) for border in piece]
        part = case.batch._each(lambda x, rows=rows: x[rows] if x.ndim == 2 else x)
        part = replace(
            part, cu_seqlens=torch.tensor([0, *inside]), lengths=tuple(torch.tensor([0, *inside]).diff())
        )
        log_probs = case.log_probs[rows].requires_grad_()
        terms = policy_loss(log_probs, case.entropies[rows], part, case.config)
        loss, sums = loss + terms.loss.detach(), sums + terms.sums
        found[rows] = torch.autograd.grad(terms.loss, log_probs)[0]
    torch.testing.assert_close(loss, whole.loss.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(sums, whole.sums, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("ratio", CHOICES["ratio"])
def test_tokens_without_a_weight_do_not_count_whatever_their_probabilities(ratio: str) -> None:
    """An overlong completion that is masked may have become impossible: exp of its ratio overflows."""
    case = Case(rl_config(ratio=ratio, kl_coef=0.3), left_out=(1, 4))
    terms, gradient = case.found()
    nothing = case.batch.weights == 0
    for wild in (1e4, -1e4, float("inf")):
        case.batch.sampled_log_probs[nothing] = case.batch.reference_log_probs[nothing] = wild
        again, in_wild = case.found()
        assert torch.equal(again.loss, terms.loss)
        assert torch.equal(again.sums, terms.sums)
        assert torch.equal(in_wild, gradient)
        assert (in_wild[nothing] == 0).all()


def test_a_micro_batch_without_a_weight_has_a_loss_of_zero_with_a_gradient() -> None:
    """Every rank must run the backward, also one that has only prompts of flat groups."""
    case = Case(rl_config(ratio="sequence", kl_coef=0.3), left_out=tuple(range(len(COMPLETIONS))))
    terms, gradient = case.found()
    assert terms.loss.requires_grad
    assert not terms.loss
    assert not gradient.any()
    assert not terms.sums.any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [(0.7, 1, -0.7), (0.7, -1, 0), (1.0, 2, -2.0), (1.0, -2, 2.0), (1.4, 1, 0), (1.4, -1, 1.4)],
)
def test_clipping_holds_back_only_what_goes_too_far(ratio: float, advantage: float, gradient: float) -> None:
    """A token whose ratio is out of bounds against its advantage is pulled back."""
    case = Case(rl_config())
    row, position, _ = COMPLETIONS[1]
    assert COMPLETIONS[1].length == 1
    case.batch.advantages[row, position], case.batch.weights[row, position] = advantage, 1.0
    case.batch.sampled_log_probs[row, position] = case.log_probs[row, position] - math.log(ratio)
    assert case.found()[1][row, position].item() == pytest.approx(gradient, rel=1e-9)


def test_advantages() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    assert flat_groups(rewards).tolist() == [False, True]
    assert group_advantages(rewards, "mean").tolist() == [[0.75, -0.25, -0.25, -0.25], [0.0] * 4]
    expected = [value / (0.5 + 1e-4) for value in (0.75, -0.25, -0.25, -0.25)]
    first, flat = group_advantages(rewards, "deviation").tolist()
    assert first == pytest.approx(expected, rel=1e-12)
    assert flat == [0.0] * 4
    thirds = torch.tensor([[0.1] * 3], dtype=torch.float64)
    assert (thirds - thirds.mean()).any(), "the mean of equal numbers is rounded"
    assert not group_advantages(thirds, "deviation").any()


def test_weights() -> None:
    lengths, learned = torch.tensor([4, 2, 10, 1]), torch.tensor([True, True, False, True])
    assert token_weights(lengths, learned, "token", 16).tolist() == [1 / 7, 1 / 7, 0, 1 / 7]
    by_length = token_weights(lengths, learned, "sequence", 16)
    torch.testing.assert_close(by_length, torch.tensor([1 / 12, 1 / 6, 0, 1 / 3], dtype=torch.float64))
    constant = token_weights(lengths, learned, "constant", 16)
    torch.testing.assert_close(constant, torch.tensor([1 / 48, 1 / 48, 0, 1 / 48], dtype=torch.float64))
    for how in CHOICES["loss_sum"]:
        assert not token_weights(lengths, torch.zeros(4, dtype=torch.bool), how, 16).any()


@pytest.mark.parametrize(("limit", "buffer"), [(20, 5), (20, 20), (20, 1), (20, 0)])
def test_the_penalty_of_overlong_completions(limit: int, buffer: int) -> None:
    for length in range(limit + 5):
        expected = -1.0
        if length <= limit - buffer:
            expected = 0.0
        elif length <= limit:
            expected = ((limit - buffer) - length) / buffer
        assert overlong_penalty(length, limit, buffer) == pytest.approx(expected, abs=1e-12), length


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_a_batch_moves_as_a_whole(kl_coef: float) -> None:
    batch = Case(rl_config(kl_coef=kl_coef)).batch
    moved = batch.to("meta")
    assert isinstance(moved, PolicyBatch)
    assert (moved.reference_log_probs is None) == (kl_coef == 0)
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            assert getattr(moved, name).device.type == "meta", name
        else:
            assert getattr(moved, name) == value, name
