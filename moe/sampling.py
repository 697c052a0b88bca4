"""Samples of a language model: many prompts at once, each a function of the model, its prompt and its key.

Rows leave when they end, and waiting prompts take their places. Every rank runs the same number of forwards,
because a forward can need the other ranks (their experts, or their part of the weights under ZeRO-3).
"""
# B samples, T tokens of a forward, L sparse layers, E experts, K experts per token

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.cache import Cache, CacheStep
from moe.model import ModelOutput
from moe.next_token import SamplingSettings, choose

_PREFILL_TOKENS = 16384  # a forward begins one prompt, or more of together at most so many tokens


class Request(NamedTuple):
    """A prompt to continue."""

    key: int  # 64 bits; all that is random about the sample
    prompt: list[int]  # at least one token


class Sample(NamedTuple):
    """How a model continued a prompt."""

    tokens: list[int]  # the new tokens, with the stop id that ended them
    log_probs: list[float]  # of each new token: see `choose`
    truncated: bool  # max_new_tokens ended it
    experts: Tensor | None  # [tokens that the model saw, L, K]: all but the last; uint8, if E > 256 int16


@dataclass
class _Row:
    """A sample that has not ended."""

    number: int  # of its request
    request: Request
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)  # of each forward [its tokens, L, K]

    def ended(self, settings: SamplingSettings, says_end: Callable[[list[int]], bool]) -> Sample | None:
        """The sample, if it has ended."""
        stopped = self.tokens[-1] in settings.stop_ids or says_end(self.tokens)
        if not stopped and len(self.tokens) < settings.max_new_tokens:
            return None
        experts = torch.cat(self.experts) if self.experts else None
        return Sample(self.tokens, self.log_probs, not stopped, experts)


@torch.no_grad()
def sample(
    model: Callable[..., ModelOutput],
    requests: Sequence[Request],
    settings: SamplingSettings,
    *,
    rows_at_once: int,
    device: torch.device | str = "cpu",
    anyone: Callable[[bool], bool] = lambda active: active,
    bias: Tensor | None = None,
    keep_experts: bool = False,
    on_token: Callable[[int, int], object] = lambda number, token: None,
    says_end: Callable[[list[int]], bool] = lambda tokens: False,
) -> Iterator[tuple[int, Sample]]:
    """Continue all prompts; yields (number of the request, its sample) in the order in which they end.

    model: called like `CausalLM.forward`, in eval mode. bias [L, E]: the selection bias of its routers.
    anyone: called before every forward with whether this rank has something to do; returns whether any rank
    has. A rank that has nothing runs a forward of one token for the others. All ranks must take all samples.
    on_token: called with (number of the request, token) for each new token. says_end: whether a sample ends
    with the last of its new tokens, for example because their text holds a stop string.
    """
    assert all(request.prompt for request in requests), "a prompt has no token"
    waiting = deque(_Row(number, request) for number, request in enumerate(requests))
    live: list[_Row] = []
    cache = Cache(min(rows_at_once, len(requests)), device)
    options = {"selection_bias": bias, "keep_experts": keep_experts}
    while anyone(bool(waiting or live)):
        if not waiting and not live:
            _forward(model, [0], Cache(1, device).prefill([1]), options)
            continue
        # A prefill lets all other rows wait, so it begins several at once: a quarter of the rows.
        fresh = _next_prompts(waiting, cache.rows - len(live)) if 4 * len(live) <= 3 * cache.rows else []
        if fresh:
            live += fresh
            step = cache.prefill([len(row.request.prompt) for row in fresh])
            ids = [token for row in fresh for token in row.request.prompt]
        else:
            fresh, step = live, cache.decode()
            ids = [row.tokens[-1] for row in live]
        _extend(fresh, _forward(model, ids, step, options), step, settings)
        for row in fresh:
            on_token(row.number, row.tokens[-1])
        ended = {place: found for place, row in enumerate(live) if (found := row.ended(settings, says_end))}
        numbers = [live[place].number for place in ended]
        live = [live[place] for place in cache.drop(ended)]
        yield from zip(numbers, ended.values(), strict=True)


def _next_prompts(waiting: deque[_Row], rows: int) -> list[_Row]:
    """Take at most so many that wait: at least one, if one waits, and together at most _PREFILL_TOKENS."""
    taken: list[_Row] = []
    tokens = 0
    while waiting and len(taken) < rows:
        tokens += len(waiting[0].request.prompt)
        if taken and tokens > _PREFILL_TOKENS:
            break
        taken.append(waiting.popleft())
    return taken


def _forward(
    model: Callable[..., ModelOutput], ids: list[int], step: CacheStep, options: dict[str, Any]
) -> ModelOutput:
    shape = (1, -1) if step.visible is None else (-1, 1)
    tokens = torch.tensor(ids, device=step.position.device)
    documents = step.documents
    packed = tokens.view(shape), step.position.view(shape), documents.cu_seqlens
    return model(*packed, cache=step, lengths=documents.lengths, **options)


def _extend(rows: list[_Row], output: ModelOutput, step: CacheStep, settings: SamplingSettings) -> None:
    """Give each of the forward's rows its next token."""
    assert output.logits is not None
    device = output.logits.device
    keys = [(row.request.key + (1 << 63)) % (1 << 64) - (1 << 63) for row in rows]  # as signed numbers
    counts = [len(row.tokens) for row in rows]
    drawing = torch.tensor(keys, device=device), torch.tensor(counts, device=device)
    tokens, log_probs = choose(output.logits, *drawing, settings)
    if output.router is not None and (experts := output.router.expert_indices) is not None:
        small = torch.uint8 if output.router.tokens_per_expert.shape[1] <= 256 else torch.int16
        seen = experts.transpose(0, 1).to(small).cpu()  # [T, L, K]
        for row, part in zip(rows, seen.split(list(step.documents.lengths)), strict=True):
            row.experts.append(part)
    both = torch.stack((tokens.double(), log_probs.double())).tolist()  # the only wait for the device
    for row, token, log_prob in zip(rows, *both, strict=True):
        row.tokens.append(int(token))
        row.log_probs.append(log_prob)
