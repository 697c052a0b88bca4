"""Batched samples equal those of one sequence at a time, computed anew for each token."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe import sampling
from moe.cache import Cache
from moe.config import ModelConfig
from moe.model import CausalLM, ModelOutput
from moe.next_token import SamplingSettings, choose
from moe.sampling import Request, Sample, _next_prompts, _Row, sample

Build = Callable[..., CausalLM]
SETTINGS = SamplingSettings(1.0, 1.0, 0, 2, 9, (5, 11))


def requests_of(count: int = 11) -> list[Request]:
    generator = torch.Generator().manual_seed(3)
    lengths = [1 + (7 * number) % 6 for number in range(count)]
    prompts = [torch.randint(0, 61, (length,), generator=generator).tolist() for length in lengths]
    return [Request(2**64 - 1 - 12345 * number, prompt) for number, prompt in enumerate(prompts)]


@torch.no_grad()
def slowly(model: CausalLM, request: Request, settings: SamplingSettings, bias: Tensor | None) -> Sample:
    """One sample without a cache."""
    tokens: list[int] = []
    log_probs: list[float] = []
    key = torch.tensor([request.key - 2**64 if request.key >= 2**63 else request.key])
    while True:
        seen = torch.tensor([request.prompt + tokens])
        borders = torch.tensor([0, seen.shape[1]], dtype=torch.int32)
        packed = seen, torch.arange(seen.shape[1])[None], borders
        output = model(*packed, selection_bias=bias, keep_experts=True)
        chosen = choose(output.logits[0, -1:], key, torch.tensor([len(tokens)]), settings)
        tokens.append(chosen[0].item())
        log_probs.append(chosen[1].item())
        stopped = tokens[-1] in settings.stop_ids
        if stopped or len(tokens) == settings.max_new_tokens:
            experts = None if output.router is None else output.router.expert_indices.transpose(0, 1)
            return Sample(tokens, log_probs, not stopped, experts)


def same(found: Sample, expected: Sample) -> None:
    assert found.tokens == expected.tokens
    assert found.truncated == expected.truncated
    assert found.log_probs == pytest.approx(expected.log_probs, rel=1e-5, abs=1e-5)
    if found.experts is not None:
        assert found.experts.dtype == torch.uint8
        assert torch.equal(found.experts.long().sort(-1).values, expected.experts.sort(-1).values)


def test_batched_equals_one_by_one_without_a_cache(generating: ModelConfig, build: Build) -> None:
    """Every architecture; rows are reused, and samples end at stop ids and at the limit."""
    model = build(generating).double().eval()  # so that the order of sums does not matter
    bias = None
    if generating.num_experts:
        bias = torch.randn(generating.num_moe_layers, 8, generator=torch.Generator().manual_seed(0)) / 4
    requests = requests_of()
    expected = [slowly(model, request, SETTINGS, bias) for request in requests]
    assert {one.truncated for one in expected} == {True, False}
    for rows in (1, 3, 4, 64):
        found = dict(sample(model, requests, SETTINGS, rows_at_once=rows, bias=bias, keep_experts=True))
        for number, one in enumerate(expected):
            same(found[number], one)
            assert (found[number].experts is None) == (generating.num_experts == 0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_and_a_dense_model_without_experts(
    dense_config: ModelConfig, build: Build, tied: bool
) -> None:
    model = build(replace(dense_config, tie_word_embeddings=tied)).eval()
    requests = requests_of(4)
    for number, found in sample(model, requests, SETTINGS, rows_at_once=3):
        same(found, slowly(model, requests[number], SETTINGS, None))


def test_a_sample_does_not_depend_on_its_company(moe_config: ModelConfig, build: Build) -> None:
    """Nor on the order of requests; another key gives another sample of the same prompt."""
    model = build(moe_config).eval()
    requests = requests_of(6)
    settings = replace(SETTINGS, stop_ids=(), min_new_tokens=0)
    together = dict(sample(model, requests, settings, rows_at_once=4))
    backwards = dict(sample(model, requests[::-1], settings, rows_at_once=2))
    for number in range(6):
        same(backwards[5 - number], together[number])
    others = [request._replace(key=request.key // 3) for request in requests]
    assert all(one.tokens != together[n].tokens for n, one in sample(model, others, settings, rows_at_once=4))


def recording(model: CausalLM, calls: list[tuple[bool, int]]) -> Callable[..., ModelOutput]:
    """The model, which notes (is it a prefill, sequences) of each forward."""

    def forward(*inputs: Tensor, cache: Any, **options: Any) -> ModelOutput:
        calls.append((cache.visible is None, len(cache.documents.lengths)))
        return model(*inputs, cache=cache, **options)

    return forward


def test_waiting_prompts_begin_when_a_quarter_of_the_rows_is_free(
    dense_config: ModelConfig, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[bool, int]] = []
    model = recording(build(dense_config).eval(), calls)
    requests = requests_of(20)
    settings = SamplingSettings(1.0, 1.0, 0, 0, 12, (3, 5, 8, 11, 13, 21))
    found = dict(sample(model, requests, settings, rows_at_once=8))
    assert min(len(one.tokens) for one in found.values()) < 12
    live, waiting = 0, 20
    for prefill, count in calls:
        if prefill:
            assert 2 <= count <= 8 or count == waiting
            assert count >= 8 - live or count == waiting  # all rows that are free
            waiting -= count
        else:
            assert count <= live  # those that have ended are no longer computed
            assert count > 6 or waiting == 0
        live = min(8, live + count) if prefill else count
    tokens = sum(count for _, count in calls)
    assert tokens == sum(len(one.tokens) for one in found.values())
    monkeypatch.setattr(sampling, "_PREFILL_TOKENS", 9)
    calls.clear()
    limited = dict(sample(model, requests, settings, rows_at_once=8))
    assert [limited[n].tokens for n in range(20)] == [found[n].tokens for n in range(20)]
    assert calls[0] == (True, 3)  # 1 + 2 + 3 tokens; the next prompt has 4


@pytest.mark.parametrize(
    ("lengths", "rows", "begun"),
    [([8192, 8192, 1], 9, 2), ([8192, 8193], 9, 1), ([20_000, 1], 9, 1), ([1, 1, 1], 2, 2), ([1], 0, 0)],
)
def test_prompts_begin_together_up_to_16_384_tokens(lengths: list[int], rows: int, begun: int) -> None:
    waiting = deque(_Row(number, Request(0, [7] * length)) for number, length in enumerate(lengths))
    assert [row.number for row in _next_prompts(waiting, rows)] == list(range(begun))
    assert [row.number for row in waiting] == list(range(begun, len(lengths)))


def test_a_rank_without_work_runs_forwards_for_the_others(dense_config: ModelConfig, build: Build) -> None:
    calls: list[tuple[bool, int]] = []
    model = recording(build(dense_config).eval(), calls)
    others = iter([True] * 4 + [False])
    asked: list[bool] = []

    def anyone(active: bool) -> bool:
        asked.append(active)
        return next(others)

    assert list(sample(model, [], SETTINGS, rows_at_once=4, anyone=anyone)) == []
    assert calls == [(True, 1)] * 4
    assert asked == [False] * 5
    others, calls[:], asked[:] = iter([True] * 5 + [False]), [], []
    short = replace(SETTINGS, max_new_tokens=2, stop_ids=())
    found = dict(sample(model, requests_of(1), short, rows_at_once=4, anyone=anyone))
    assert len(found[0].tokens) == 2
    assert asked == [True, True, False, False, False, False]
    assert calls == [(True, 1), (False, 1), *[(True, 1)] * 3]


def test_tokens_are_told_as_they_come(dense_config: ModelConfig, build: Build) -> None:
    told: dict[int, list[int]] = {}
    options = {"rows_at_once": 2, "on_token": lambda number, token: told.setdefault(number, []).append(token)}
    found = dict(sample(build(dense_config).eval(), requests_of(3), SETTINGS, **options))
    assert told == {number: one.tokens for number, one in found.items()}


def test_many_experts_are_kept_in_two_bytes(moe_config: ModelConfig, build: Build) -> None:
    model = build(replace(moe_config, num_experts=300)).eval()
    requests = requests_of(2)
    for number, found in sample(model, requests, SETTINGS, rows_at_once=2, keep_experts=True):
        assert found.experts.dtype == torch.int16
        expected = slowly(model, requests[number], SETTINGS, None)
        assert torch.equal(found.experts.long(), expected.experts)
        assert found.experts.max() > 255


def test_more_room_is_made_for_longer_sequences(dense_config: ModelConfig) -> None:
    """By half at least, and what is there stays."""
    cache, room = Cache(2), []
    new = torch.arange(5.0)[:, None, None]
    kept = cache.prefill([3, 2]).add_tokens(0, new, -new)
    assert kept[0].shape == (2, 3, 1, 1)
    for _ in range(20):
        cache.decode().add_tokens(0, torch.ones(2, 1, 1), torch.ones(2, 1, 1))
        room.append(cache._layers[0][0].shape[1])
    assert sorted(set(room)) == [4, 6, 9, 13, 19, 28]
    keys, values = cache._layers[0]
    assert keys[:, :3, 0, 0].tolist() == [[0, 1, 2], [3, 4, 1]]
    assert values[:, :3, 0, 0].tolist() == [[0, -1, -2], [-3, -4, 1]]


def test_a_sample_ends_where_its_tokens_say_so(dense_config: ModelConfig, build: Build) -> None:
    """The stop is that of one sample alone, and the sample is not truncated."""
    model, requests = build(dense_config).eval(), requests_of(5)
    settings = replace(SETTINGS, stop_ids=(), min_new_tokens=0)
    whole = dict(sample(model, requests, settings, rows_at_once=2))
    stop = whole[1].tokens[3]
    found = dict(
        sample(model, requests, settings, rows_at_once=2, says_end=lambda tokens: tokens[-1] == stop)
    )
    for number, one in whole.items():
        end = one.tokens.index(stop) + 1 if stop in one.tokens else len(one.tokens)
        assert found[number].tokens == one.tokens[:end]
        assert found[number].truncated == (stop not in one.tokens)
    assert len(found[1].tokens) < len(whole[1].tokens)
