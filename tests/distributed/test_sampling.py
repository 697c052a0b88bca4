"""Samples under expert parallelism and every stage of ZeRO equal those of one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from layouts import FAMILY, SmallRun, small_config

from moe.init import init_weights
from moe.model import CausalLM
from moe.next_token import SamplingSettings
from moe.sampling import Request, Sample, sample

SETTINGS = SamplingSettings(1.0, 1.0, 0, 1, 7, (3, 9, 17))
MODEL = [*FAMILY["qwen3_next"], "model.initializer_range=0.2"]
LAYOUTS = {
    "zero0": ["deepspeed=zero0", "parallel.ep_size=2"],
    "zero1": ["deepspeed=zero1", "parallel.ep_size=2", "parallel.dispatcher=all_to_all"],
    "zero2": ["deepspeed=zero2", "parallel.ep_size=1"],
    "zero3": ["deepspeed=zero3", "parallel.ep_size=1"],
    "zero3 with experts of two ranks": ["deepspeed=zero3", "parallel.ep_size=2"],
}


def requests_of(count: int) -> list[Request]:
    generator = torch.Generator().manual_seed(3)
    lengths = [1 + (7 * number) % 6 for number in range(count)]
    prompts = [torch.randint(1, 64, (length,), generator=generator).tolist() for length in lengths]
    return [Request(number, prompt) for number, prompt in enumerate(prompts)]


def anyone(active: bool) -> bool:
    flag = torch.tensor(int(active))
    dist.all_reduce(flag)
    return bool(flag)


def sampled(layouts: list[list[str]], bias: torch.Tensor) -> list[list[dict[int, Sample]]]:
    """For each layout: the samples of this rank's share of the prompts: some and some, all and none.

    Then a step of training, to which the forwards must have done nothing.
    """
    rank, requests, found = dist.get_rank(), requests_of(7), []
    for layout in layouts:
        run = SmallRun(*MODEL, "micro_batch_size=4", *layout)
        run.engine.module.eval()
        rounds = []
        for shares in ([requests[:5], requests[5:]], [[], requests]):
            given: dict[str, Any] = {"rows_at_once": 3, "anyone": anyone, "bias": bias, "keep_experts": True}
            rounds.append(dict(sample(run.engine._engine, shares[rank], SETTINGS, **given)))
        run.engine.module.train()
        assert run.train(range(1))["grad_norms"][0] > 0
        run.engine.close()
        found.append(rounds)
    return found


@pytest.mark.timeout(500)
def test_two_ranks_equal_one_process() -> None:
    model = CausalLM(config := small_config(*MODEL).model).eval()
    init_weights(model, small_config(*MODEL).seed)
    bias = (
        torch.randn(config.num_moe_layers, config.num_experts, generator=torch.Generator().manual_seed(0)) / 4
    )
    given: dict[str, Any] = {"rows_at_once": 4, "bias": bias, "keep_experts": True}
    expected = dict(sample(model, requests_of(7), SETTINGS, **given))
    assert {one.truncated for one in expected.values()} == {True, False}
    first, second = run_ranks(sampled, 2, list(LAYOUTS.values()), bias, timeout=400)
    for name, *both in zip(LAYOUTS, first, second, strict=True):
        (some, none), (rest, every) = both
        assert none == {}
        for found in ({**some, **{5 + number: one for number, one in rest.items()}}, every):
            assert sorted(found) == sorted(expected), name
            for number, one in expected.items():
                assert found[number].tokens == one.tokens, name
                assert found[number].log_probs == pytest.approx(one.log_probs, rel=1e-5, abs=1e-5), name
                assert torch.equal(found[number].experts.sort(-1).values, one.experts.sort(-1).values), name
