"""The next token of many samples: a function of the logits and of each sample's key and length alone."""
# B samples, V vocabulary, M candidates: all tokens, or the most probable first

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# splitmix64 (Steele, Lea, Flood 2014), its constants as signed numbers
_STEP, _FACTORS = -0x61C8864680B583EB, ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen."""

    temperature: float  # 0 = always the most probable token
    top_p: float  # the fewest of the top_k tokens that have this share of their probability; 1 = all
    top_k: int  # the most probable tokens; 0 = all
    min_new_tokens: int  # no stop id before
    max_new_tokens: int
    stop_ids: tuple[int, ...]


def choose(logits: Tensor, keys: Tensor, counts: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """logits [B, V], keys and counts of earlier new tokens [B] int64 -> tokens [B], log-probabilities [B].

    The log-probability, in fp32, is that under softmax(logits / temperature) of the whole vocabulary, at
    temperature 0 under softmax(logits). A token of probability 0, or that is cut off, is never chosen.
    """
    scores = logits.float() / (settings.temperature or 1.0)
    allowed = scores
    if settings.stop_ids and settings.min_new_tokens:
        stops = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
        stops[list(settings.stop_ids)] = True
        early = counts < settings.min_new_tokens
        allowed = scores.masked_fill(early.unsqueeze(1) & stops, -torch.inf)
    if settings.temperature == 0:
        tokens = allowed.argmax(-1)
    else:
        tokens = _draw(allowed, uniforms(keys, counts), settings)
    return tokens, scores.gather(1, tokens.unsqueeze(1)).squeeze(1) - scores.logsumexp(-1)


def uniforms(keys: Tensor, counts: Tensor) -> Tensor:
    """Random numbers [B] fp64 in [0, 1): number `counts` of the splitmix64 seeded by `keys`, both int64."""
    word = keys + (counts + 1) * _STEP
    for shift, factor in _FACTORS:
        word = (word ^ _shifted(word, shift)) * factor
    return _shifted(word ^ _shifted(word, 31), 11).double() * 2.0**-53


def _shifted(word: Tensor, bits: int) -> Tensor:
    """Bits of an unsigned number shifted to the right: torch's own shift repeats the sign."""
    return (word >> bits) & ((1 << 64 - bits) - 1)


def _draw(scores: Tensor, uniform: Tensor, settings: SamplingSettings) -> Tensor:
    """A token for each row of scores [B, V]: the inverse of its distribution function at `uniform` [B]."""
    if settings.top_k == 0 and settings.top_p == 1:
        weights = scores.softmax(-1)
        return _place(weights, uniform * weights.sum(-1, dtype=torch.float64))
    scores, ids = scores.sort(dim=-1, descending=True, stable=True)  # of equal ones the smaller id first
    weights = scores[:, : settings.top_k or None].softmax(-1)  # [B, M]
    if settings.top_p < 1:
        # sums reach a number when they exceed the one before it
        last = _place(weights, torch.full_like(uniform, math.nextafter(settings.top_p, 0)))
        number = torch.arange(weights.shape[1], device=weights.device)
        weights = weights.masked_fill(number > last.unsqueeze(1), 0)
    place = _place(weights, uniform * weights.sum(-1, dtype=torch.float64))
    return ids.gather(1, place.unsqueeze(1)).squeeze(1)


def _place(weights: Tensor, target: Tensor) -> Tensor:
    """Where the running sum of weights [B, M] first exceeds target [B] fp64; never a weight of 0: [B].

    The fp64 sums are products with triangular matrices, first of blocks: cumsum is not deterministic on CUDA.
    """
    size = 1 << weights.shape[1].bit_length() // 2  # about as many blocks as there are places in a block
    blocks = F.pad(weights, (0, -weights.shape[1] % size)).unflatten(1, (-1, size))
    block, rest = _search(blocks.sum(-1, dtype=torch.float64), target)
    place, _ = _search(blocks[torch.arange(len(block), device=block.device), block].double(), rest)
    return block * size + place


def _search(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The place of `_place`, and what of the target [B] is left for it. If no sum exceeds it, the last place.

    Sums are rounded: they can grow where a weight is 0, and their last one can be too small.
    """
    number = torch.arange(weights.shape[1], device=weights.device)
    sums = weights @ _triangle(len(number), weights.device)
    there = weights > 0
    first = number.where(there & (sums > target.unsqueeze(1)), len(number)).amin(-1)
    last = number.where(there, -1).amax(-1)
    place = torch.minimum(first, last).clamp(min=0)  # weights that are not numbers have no last
    before = (sums - weights).gather(1, place.unsqueeze(1)).squeeze(1)
    return place, target - before


@cache
def _triangle(size: int, device: torch.device) -> Tensor:
    """[size, size] fp64, ones on and above the diagonal."""
    return torch.ones(size, size, dtype=torch.float64, device=device).triu()
