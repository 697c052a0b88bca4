"""Texts that a model scores or continues on all ranks: rank 0 says which, the other ranks work for it.

A program that asks a model, such as a benchmark, then runs once, on rank 0. Every rank runs the same number
of forwards, because a forward can need the other ranks (their experts, or their part of the weights under
ZeRO-3).
"""
# T tokens of a forward, N labels that it scores

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from moe.model import ModelOutput
from moe.next_token import SamplingSettings
from moe.sampling import Request, sample
from trainer.ranks.runtime import Ranks

T = TypeVar("T")
_QUIET_SECONDS, _SECONDS_BETWEEN_LINES = 2.0, 5.0  # of progress


class Text(NamedTuple):
    """Tokens that the model reads, and the continuations that are scored at their end."""

    ids: tuple[int, ...]
    continuations: list[tuple[int, list[int]]]  # (number, tokens): all but the last one end `ids`


class Writing(NamedTuple):
    """Prompts to continue."""

    requests: list[Request]
    settings: SamplingSettings
    until: list[str]  # a sample ends when its text holds one of them


class Room(NamedTuple):
    """What a rank computes at once."""

    rows: int  # texts
    tokens: int  # of a forward, unless a single text is longer


class Orders:
    """A model, called like `CausalLM.forward` and in evaluation mode, that all ranks run for rank 0.

    bias [L, E]: the selection bias of its routers. say: prints a line on the progress of longer work.
    """

    def __init__(
        self,
        model: Callable[..., ModelOutput],
        bias: Tensor | None,
        tokenizer: Tokenizer,
        ranks: Ranks,
        room: Room,
        say: Callable[[str], object],
    ) -> None:
        self._model, self._bias, self._tokenizer = model, bias, tokenizer
        self._ranks, self._room, self._say = ranks, room, say
        self.failed = False  # in an order itself, so that the other ranks may wait inside of one

    def run(self, ask: Callable[[], T]) -> T:
        """What `ask` returns on rank 0, on every rank. It alone may call `score` and `write`.

        Raises its ConfigError or DataError on every rank.
        """

        def lead() -> T:
            try:
                return ask()
            finally:
                if not self.failed and self._ranks.world_size > 1:
                    dist.broadcast_object_list([None])

        if not self._ranks.is_main:
            self._serve()
        return self._ranks.from_main(lead)

    def score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """The log-probability of each continuation after its context, and whether greedy decoding says it.

        Together they must fit into the model, and a context has a token at least.
        """
        texts: dict[tuple[int, ...], Text] = {}  # what several pairs have in common is read once
        for number, (context, continuation) in enumerate(pairs):
            if not continuation:
                continue
            ids = tuple(context + continuation)[:-1]
            texts.setdefault(ids, Text(ids, [])).continuations.append((number, continuation))
        found = [(0.0, True)] * len(pairs)  # stays, if a continuation has no token
        progress, done = Progress("texts", len(texts), self._say), 0
        batches = list(packed(list(texts.values()), self._room))
        for first in range(0, len(batches), self._ranks.world_size):
            some = batches[first : first + self._ranks.world_size]
            for number, log_prob, best in self._everywhere(some):
                found[number] = log_prob, best
            done += sum(map(len, some))
            progress.tell(done)
        return found

    def write(self, writing: Writing) -> list[list[int]]:
        """The new tokens of each request."""
        found = dict(self._everywhere(writing))
        return [found[number] for number in range(len(writing.requests))]

    def _everywhere(self, order: list[list[Text]] | Writing) -> list[Any]:
        """What all ranks find for an order, one after another."""
        self.failed = True
        if self._ranks.world_size == 1:
            mine = self._carry_out(order)
            self.failed = False
            return mine
        dist.broadcast_object_list([order])
        everywhere = self._gathered(self._carry_out(order))
        self.failed = False
        return [one for of_rank in everywhere for one in of_rank]

    def _serve(self) -> None:
        """Carry out the orders of rank 0 until it has no more."""
        while True:
            order: list[Any] = [None]
            dist.broadcast_object_list(order)
            if order[0] is None:
                return
            self._gathered(self._carry_out(order[0]))

    def _gathered(self, mine: list[Any]) -> list[list[Any]]:
        everywhere: list[Any] = [None] * self._ranks.world_size
        dist.all_gather_object(everywhere, mine)
        return everywhere

    def _carry_out(self, order: list[list[Text]] | Writing) -> list[Any]:
        """This rank's share of an order: (number, log-probability, greedy), or (number, new tokens)."""
        if isinstance(order, Writing):
            return self._written(order)
        mine = order[self._ranks.rank] if self._ranks.rank < len(order) else [Text((0,), [(0, [0])])]
        found = self._scored(mine)
        return found if self._ranks.rank < len(order) else []  # a forward for the others

    @torch.no_grad()
    def _scored(self, texts: list[Text]) -> list[tuple[int, float, bool]]:
        device = self._ranks.device
        lengths = [len(text.ids) for text in texts]
        ids = torch.tensor([[token for text in texts for token in text.ids]], device=device)
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        borders = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
        places: list[int] = []
        end = 0
        for text in texts:
            end += len(text.ids)
            places += [end - len(one) + n for _, one in text.continuations for n in range(len(one))]
        continuations = [one for text in texts for one in text.continuations]
        labels = torch.tensor([token for _, one in continuations for token in one], device=device)
        output = self._model(
            ids,
            positions[None],
            borders,
            labels=labels,
            how=torch.tensor(places, dtype=torch.long, device=device),
            lengths=lengths,
            selection_bias=self._bias,
        )
        assert output.log_probs is not None
        assert output.best is not None
        both = torch.stack((output.log_probs.double(), output.best.double())).cpu()  # [2, N]
        parts = both.split([len(one) for _, one in continuations], dim=1)
        sums = [(float(part[0].sum()), bool(part[1].all())) for part in parts]
        return [(number, *of) for (number, _), of in zip(continuations, sums, strict=True)]

    def _written(self, writing: Writing) -> list[tuple[int, list[int]]]:
        rank, ranks = self._ranks.rank, self._ranks.world_size
        numbers = range(len(writing.requests))[rank::ranks]
        reach = max((len(stop.encode()) for stop in writing.until), default=0)  # tokens that may hold it

        def says_end(tokens: list[int]) -> bool:
            text = self._tokenizer.decode(tokens[-reach:])
            return any(stop in text for stop in writing.until)

        progress, found = Progress("completions", len(writing.requests), self._say), []
        ended = sample(
            self._model,
            writing.requests[rank::ranks],
            writing.settings,
            rows_at_once=self._room.rows,
            device=self._ranks.device,
            anyone=self._ranks.any,
            bias=self._bias,
            says_end=says_end if reach else lambda tokens: False,
        )
        for place, one in ended:
            found.append((numbers[place], one.tokens))
            if rank == 0:
                progress.tell(min(len(found) * ranks, len(writing.requests)))
        return found


def packed(texts: list[Text], room: Room) -> Iterator[list[Text]]:
    """Texts in batches that fit, the longest first: the ranks get batches of about the same length."""
    batch: list[Text] = []
    tokens = 0
    for text in sorted(texts, key=lambda text: -len(text.ids)):
        if batch and (tokens + len(text.ids) > room.tokens or len(batch) == room.rows):
            yield batch
            batch, tokens = [], 0
        batch.append(text)
        tokens += len(text.ids)
    if batch:
        yield batch


class Progress:
    """Tells how far a work is and how long the rest takes: first after two seconds, then ever more rarely."""

    def __init__(self, what: str, total: int, say: Callable[[str], object]) -> None:
        self._what, self._total, self._say = what, total, say
        self._started = time.monotonic()
        self._next = self._started + _QUIET_SECONDS

    def tell(self, done: int) -> None:
        """Call when so many are done."""
        now = time.monotonic()
        if now < self._next or done >= self._total:
            return
        passed = now - self._started
        self._next = now + max(_SECONDS_BETWEEN_LINES, passed / 10)
        left = passed / done * (self._total - done)
        self._say(f"{done:,} of {self._total:,} {self._what}, {left:.0f} s left")
