"""Every dispatcher on 2 and 4 ranks equals LocalDispatcher on one process, in outputs and in gradients."""

from math import comb
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import Tensor

from moe.dispatch import AllToAllDispatcher, DeduplicatedAllToAllDispatcher, LocalDispatcher
from moe.experts import Experts

# T tokens of all ranks, H hidden, E experts, K experts per token

H, INTERMEDIATE, E = 16, 8, 8
Results = dict[tuple[str, int, str], dict[str, Any]]  # by kind, chunks, case
CLASSES = {"all_to_all": AllToAllDispatcher, "deduplicated": DeduplicatedAllToAllDispatcher}
DISPATCHERS = {(kind, chunks): CLASSES[kind] for kind in CLASSES for chunks in (1, 2, 3)}


class Case(NamedTuple):
    tokens: list[int]  # of each of 4 ranks; 2 ranks use the first two
    top_k: int
    experts: list[int]  # the experts that may be selected
    dropped: float = 0.0  # share of the slots that are sent to no expert


CASES = {
    "all experts": Case([7, 9, 6, 8], 3, list(range(E))),
    "uneven ranks, empty experts": Case([11, 1, 3, 5], 2, [1, 2, 4, 7]),
    "K=1": Case([7, 9, 6, 8], 1, list(range(E))),
    "K=E": Case([4, 3, 2, 5], E, list(range(E))),
    "one hot expert": Case([7, 9, 6, 8], 1, [5]),
    "all to one rank": Case([7, 9, 6, 8], 2, [6, 7]),
    "ranks without tokens": Case([0, 9, 0, 8], 3, list(range(E))),
    "dropped": Case([7, 9, 6, 8], 3, list(range(E)), 0.5),
    "all dropped": Case([7, 9, 6, 8], 2, list(range(E)), 1.0),
    "no tokens": Case([0, 0, 0, 0], 3, list(range(E))),
}


def inputs(case: Case, world_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T,H], routing_weights [T,K], expert_indices [T,K], gradient of y [T,H]."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(case.tokens[:world_size])
    order = torch.rand(tokens, len(case.experts), generator=generator).argsort(-1)[:, : case.top_k]
    x, grad_y = torch.randn(2, tokens, H, generator=generator)
    routing_weights = torch.rand(tokens, case.top_k, generator=generator)
    indices = torch.tensor(case.experts)[order]
    indices[torch.rand(indices.shape, generator=generator) < case.dropped] = E
    return x, routing_weights, indices, grad_y


def build_experts(rank: int = 0, world_size: int = 1) -> Experts:
    """This rank's share of E experts, whose weights do not depend on the number of ranks."""
    generator = torch.Generator().manual_seed(1)
    experts = Experts(E // world_size, H, INTERMEDIATE, "loop")
    for weight in experts.parameters():
        whole = torch.randn(E, *weight.shape[1:], generator=generator)
        weight.data.copy_(whole.chunk(world_size)[rank])
    return experts


def run_case(
    dispatcher: Any, experts: Experts, x: Tensor, routing_weights: Tensor, indices: Tensor, grad_y: Tensor
) -> dict[str, Tensor]:
    x, routing_weights = x.clone().requires_grad_(), routing_weights.clone().requires_grad_()
    y = dispatcher(x, routing_weights, indices, experts, drops=True)
    leaves = {"x": x, "routing_weights": routing_weights, **dict(experts.named_parameters())}
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def run_all_cases() -> Results:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    collectives = 0

    def counting_all_to_all(*args: Any, **kwargs: Any) -> Any:
        nonlocal collectives
        collectives += 1
        return dist.all_to_all_single(*args, **kwargs)

    results = {}
    for (kind, chunks), dispatcher in DISPATCHERS.items():
        for name, case in CASES.items():
            mine = [values.split(case.tokens[:world_size])[rank] for values in inputs(case, world_size)]
            collectives = 0
            instance = dispatcher(dist.group.WORLD, counting_all_to_all, chunks)
            result = run_case(instance, build_experts(rank, world_size), *mine)
            results[kind, chunks, name] = {**result, "collectives": collectives}
    return results


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[Results]:
    return run_ranks(run_all_cases, request.param)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("kind", "chunks"), DISPATCHERS)
def test_equals_local(ranks: list[Results], kind: str, chunks: int, name: str) -> None:
    expected = run_case(LocalDispatcher(), build_experts(), *inputs(CASES[name], len(ranks)))
    for key, value in expected.items():
        # Ranks hold consecutive shares of tokens and experts: a result is the shares concatenated.
        actual = torch.cat([rank[kind, chunks, name][key] for rank in ranks])
        scale = value.abs().max().item() if value.numel() else 0.0
        torch.testing.assert_close(actual, value, rtol=0, atol=1e-6 * scale, msg=lambda m, k=key: f"{k}: {m}")


def test_every_rank_meets_every_collective(ranks: list[Results]) -> None:
    """One for counts; per chunk, forward and backward, one there and one back."""
    for rank in ranks:
        for (_, chunks, _), result in rank.items():
            assert result["collectives"] == 1 + 4 * chunks


def record_overlap() -> list[str]:
    """The order of sends, waits and expert computations in forward and backward of two chunks."""
    events: list[str] = []

    class Work:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            events.append("wait")
            self.work.wait()

    def recording_all_to_all(out: Tensor, rows: Tensor, **kwargs: Any) -> Work:
        work = dist.all_to_all_single(out, rows, **kwargs)
        if rows.dtype == torch.int64:  # counts
            return work
        events.append("send")
        return Work(work)

    experts = build_experts()
    experts.register_forward_hook(lambda *_: events.append("experts"))
    experts.register_full_backward_hook(lambda *_: events.append("experts"))
    dispatcher = DeduplicatedAllToAllDispatcher(dist.group.WORLD, recording_all_to_all, chunks=2)
    run_case(dispatcher, experts, *inputs(CASES["all experts"], 1))
    return events


def test_chunks_travel_while_experts_compute() -> None:
    (events,) = run_ranks(record_overlap, 1)
    one_way = ["send", "send", "wait", "experts", "send", "wait", "experts", "send", "wait", "wait"]
    assert events == one_way * 2


def count_bytes(top_k: int, tokens: int) -> dict[str, tuple[int, int]]:
    """Per dispatcher, in bf16: the bytes that this rank sent, the same computed by hand, and rows sent."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    indices = torch.rand(tokens, E, generator=generator).argsort(-1)[:, :top_k]
    x = torch.randn(tokens, H, generator=generator).bfloat16()
    routing_weights = torch.rand(tokens, top_k, generator=generator).bfloat16()
    experts = build_experts(rank, world_size).bfloat16()

    destinations = [sorted(row // (E // world_size) for row in token) for token in indices.tolist()]
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, destinations)
    result = {}
    for kind, dispatcher in CLASSES.items():
        lists = [[set(t) if kind == "deduplicated" else t for t in owner] for owner in everyone]
        out = sum(destination != rank for token in lists[rank] for destination in token)
        back = sum(d == rank for r, owner in enumerate(lists) if r != rank for token in owner for d in token)
        slots = top_k if kind == "deduplicated" else 1
        by_hand = out * (2 * H + slots * (2 + 2)) + back * 2 * H  # bf16 tokens and weights, int16 ids
        instance = dispatcher(dist.group.WORLD)
        y = instance(x, routing_weights, indices, experts, drops=False)
        assert y.dtype == torch.bfloat16
        assert y.isfinite().all()
        here = sum(d == rank for owner in everyone for token in owner for d in token)
        assert (instance.slots_routed, instance.slots_received) == (tokens * top_k, here)
        result[kind] = (instance.bytes_sent, by_hand, out)
    return result


@pytest.mark.parametrize("world_size", [2, 4])
def test_bytes_sent(world_size: int) -> None:
    top_k, tokens = 4, 1000
    results = run_ranks(count_bytes, world_size, top_k, tokens)
    for result in results:
        for sent, by_hand, _ in result.values():
            assert sent == by_hand
    # With uniform routing a token visits a given rank unless all K of its experts are on other ranks.
    visits = 1 - comb(E - E // world_size, top_k) / comb(E, top_k)
    for kind, expected in {"all_to_all": top_k / world_size, "deduplicated": visits}.items():
        rows = sum(result[kind][2] for result in results) / (world_size * tokens)
        assert rows == pytest.approx((world_size - 1) * expected, rel=0.03)


class Recorder:
    """In place of experts: keeps the rows that arrive, [N',H], [N',C], [N',C]; returns the tokens."""

    def __init__(self, num_local_experts: int) -> None:
        self.num_local_experts = num_local_experts

    def __call__(self, rows: Tensor, weights: Tensor, ids: Tensor, num_rows: int) -> Tensor:
        self.arrived = [rows.detach().clone(), weights.detach().clone(), ids.long()]
        return rows + 0 * weights.sum(1, keepdim=True)


def send_every_id(dtype: torch.dtype) -> None:
    """As floats, some ids are subnormal and, in 16 bits, some are NaN; all arrive, with their weights."""
    rank, experts, top_k = dist.get_rank(), 2**15 - 2, 6
    ids = torch.randperm(experts, generator=torch.Generator().manual_seed(0)).view(-1, top_k)
    x = ids.to(dtype).requires_grad_()  # H = K: the token says which experts it wants, as far as dtype can
    weights = (ids % 251).to(dtype).requires_grad_()  # exact in every dtype
    share = experts // 2
    for kind, dispatcher in CLASSES.items():
        recorder = Recorder(share)
        y = dispatcher(dist.group.WORLD)(x, weights, ids, recorder, drops=False)
        rows, arrived, local = recorder.arrived
        here = local < share
        counted = (local + rank * share)[here]
        assert counted.bincount(minlength=experts).tolist() == [
            2 * (rank * share <= expert < (rank + 1) * share) for expert in range(experts)
        ], "each rank sends every id once"
        assert torch.equal(arrived[here], (counted % 251).to(dtype))
        if kind == "deduplicated":
            assert torch.equal(rows[here], counted.to(dtype))
        grads = torch.autograd.grad(y.float().sum(), (x, weights))
        assert torch.equal(grads[0], _visits(ids, kind, share).to(dtype).expand_as(x))
        assert not grads[1].any()


def _visits(ids: Tensor, kind: str, share: int) -> Tensor:
    """How many rows each token sends, [T,1]."""
    if kind == "all_to_all":
        return torch.full_like(ids[:, :1], ids.shape[1])
    first = (ids < share).sum(1, keepdim=True)
    return (first > 0).long() + (first < ids.shape[1]).long()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_id_arrives(dtype: torch.dtype) -> None:
    run_ranks(send_every_id, 2, dtype)


def hang_or_fail(behaviour: str) -> None:
    if dist.get_rank() == 1:
        assert behaviour == "hang", "this rank fails on purpose"
    else:
        dist.all_reduce(torch.zeros(1))  # waits for the other rank
    while True:
        pass


def test_harness_shows_the_rank_that_fails() -> None:
    with pytest.raises(AssertionError, match=r"(?s)--- rank 1 ---.*this rank fails on purpose"):
        run_ranks(hang_or_fail, 2, "fail")


def test_harness_ends_ranks_that_hang() -> None:
    with pytest.raises(AssertionError, match=r"(?s)Timeout.*hang_or_fail"):
        run_ranks(hang_or_fail, 2, "hang", timeout=3)
