"""What the loss is given of completions: each number beside its own token, whatever the layout."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from trainer.settings.rl import RLConfig, SamplingConfig
from trainer.stages.completions import Completion, StepCompletions

LONGEST, GROUP = 9, 4
SAMPLING = SamplingConfig(0.7, 1.0, 0, 0, LONGEST, 8, False, "none")
RL = RLConfig(GROUP, 1, 8, SAMPLING, {}, "mean", "token", "token", 0.2, 0.28, "drop", "learn", 0, 0.0, None)
LAYOUTS = [(1, 16), (1, 4), (2, 4), (4, 1), (2, 8)]


def completions(kept: bool = False) -> list[Completion]:
    """Four groups, the second of which is flat; every token and every probability is another one."""
    found, token = [], 1
    for number in range(4 * GROUP):
        row, prompt_tokens, length = number // GROUP, 1 + number // GROUP, 1 + (5 * number) % LONGEST
        ids = list(range(token, token + prompt_tokens + length))
        token += len(ids)
        experts = torch.tensor(ids[:-1]).view(-1, 1, 1).repeat(1, 2, 3).to(torch.uint8) if kept else None
        reward = 0.5 if row == 1 else (number * 7 % 11) / 11
        log_probs = [-id_ / 8 for id_ in ids[prompt_tokens:]]
        one = Completion(row, "asks", number % GROUP, ids, prompt_tokens, log_probs, length == LONGEST)
        found.append(replace(one, reward=reward, experts=experts))
    return found


def slow(rl: RLConfig) -> dict[int, dict[str, float]]:
    """For each token that is a label, whose ids are all different: what the loss must be given."""
    some, found = completions(), {}
    rewards = [one.reward for one in some]
    if rl.overlong == "penalise":
        for i, one in enumerate(some):
            start = LONGEST - rl.overlong_buffer
            rewards[i] -= max(0, one.length - start) / rl.overlong_buffer
    left_out = set()
    for i, one in enumerate(some):
        group = rewards[i - i % GROUP : i - i % GROUP + GROUP]
        if rl.flat_groups == "drop" and len(set(group)) == 1:
            left_out.add(i)
        if rl.overlong == "mask" and one.truncated:
            left_out.add(i)
    tokens = sum(one.length for i, one in enumerate(some) if i not in left_out)
    for i, one in enumerate(some):
        group = rewards[i - i % GROUP : i - i % GROUP + GROUP]
        for place in range(one.prompt_tokens, len(one.ids)):
            found[one.ids[place]] = {
                "before": one.ids[place - 1],
                "position": place - 1,
                "log_prob": -one.ids[place] / 8,
                "advantage": rewards[i] - sum(group) / GROUP if len(set(group)) > 1 else 0.0,
                "weight": 0.0 if i in left_out else 1 / tokens,
            }
    return found


VARIANTS: list[dict[str, Any]] = [
    {},
    {"flat_groups": "keep"},
    {"overlong": "mask"},
    {"overlong": "penalise", "overlong_buffer": 4},
]


@pytest.mark.parametrize("choice", VARIANTS, ids=str)
@pytest.mark.parametrize(("world_size", "micro"), LAYOUTS)
def test_each_label_has_what_belongs_to_it(choice: dict[str, Any], world_size: int, micro: int) -> None:
    rl = replace(RL, **choice)
    expected, seen = slow(rl), {}
    step = StepCompletions(completions(), rl)
    ranks = [step.micro_batches(rank, world_size, micro) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1, "else ranks would wait for each other"
    for batch in (batch for batches in ranks for batch in batches):
        assert len(batch.lengths) == micro
        assert batch.token_mask.all()
        assert batch.temperature == 0.7
        for place, label in enumerate(batch.labels[0].tolist()):
            given = {
                "before": batch.input_ids[0, place].item(),
                "position": batch.position_ids[0, place].item(),
                "log_prob": batch.sampled_log_probs[0, place].item(),
                "advantage": batch.advantages[0, place].item(),
                "weight": batch.weights[0, place].item(),
            }
            if label == -100:  # the next token is of the prompt
                assert (given["log_prob"], given["advantage"], given["weight"]) == (0, 0, 0)
            else:
                assert label not in seen
                seen[label] = given
    assert seen.keys() == expected.keys()
    for label, given in seen.items():
        assert given == pytest.approx(expected[label], rel=1e-6, abs=1e-7), label


def test_ranks_and_micro_batches_have_as_much_to_do() -> None:
    """A micro-batch holds completions of similar length, and those of the ranks are next to each other."""
    step = StepCompletions(completions(), RL)
    first, second = (step.micro_batches(rank, 2, 4) for rank in range(2))
    for one, two in zip(first, second, strict=True):
        assert abs(one.tokens - two.tokens) <= 4
    lengths = [sorted(first[m].lengths + second[m].lengths) for m in range(2)]
    assert lengths[1][-1] <= lengths[0][0], "the longest come first"


def test_experts_stand_beside_their_tokens() -> None:
    [batch] = StepCompletions(completions(kept=True), RL).micro_batches(0, 1, 16)
    assert batch.sampled_experts is not None
    assert batch.sampled_experts.dtype == torch.int16
    assert batch.sampled_experts.shape == (batch.input_ids.numel(), 2, 3)
    assert torch.equal(batch.sampled_experts[:, 1, 2].to(torch.uint8), batch.input_ids[0].to(torch.uint8))
    assert not batch.replay
    replayed = replace(RL, sampling=replace(SAMPLING, router_replay="replay"))
    [batch] = StepCompletions(completions(kept=True), replayed).micro_batches(0, 1, 16)
    assert batch.replay


def test_flat_groups_and_penalties_are_told() -> None:
    step = StepCompletions(completions(), RL)
    assert step.flat.tolist() == [False, True, False, False]
    assert step.penalties.eq(0).all()
    step = StepCompletions(completions(), replace(RL, overlong="penalise", overlong_buffer=LONGEST))
    assert step.penalties.tolist() == pytest.approx([-one.length / LONGEST for one in completions()])
