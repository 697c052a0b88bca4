"""A run goes on with other layouts of ranks, at random: allowed or refused, each expert and state once."""

import itertools
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from moe.block import MoEBlock
from moe.config import ConfigError
from moe.dispatch import LocalDispatcher
from moe.parallelize import apply_expert_parallel
from trainer.checkpoints.optimizer_state import fill_fragments, write_fragments
from trainer.engine.engine import Fragment
from trainer.resume import change_layout, record_layout
from trainer.settings.config import RunConfig
from trainer.settings.parallel import ParallelPlan
from trainer.settings.run_folder import freeze, read_run

ROWS, EXPERTS = 24, 12


@pytest.fixture
def run_dir(composed, tmp_path):
    sizes = [f"stage.global_batch_size={ROWS}", f"model.num_experts={EXPERTS}"]
    freeze(tmp_path, composed("experiment=demo", *sizes), [])
    return tmp_path


def resumed(run_dir, overrides: list[str]) -> RunConfig:
    """What `python -m trainer.resume` would start; nothing of it stays in the folder."""
    for path in run_dir.glob("resume-*"):
        path.unlink()
    cfg = read_run(run_dir)
    changed = change_layout(cfg, overrides)
    config = RunConfig.load(cfg)
    config.check()
    record_layout(run_dir, changed, overrides)
    assert RunConfig.of_run(run_dir) == config, "the ranks read what was checked"
    return config


@pytest.mark.fuzzing(100, 1000)
def test_a_resume_is_possible_if_the_numbers_divide(fuzz, run_dir):
    sizes = st.one_of(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(-2, 26))
    allowed = []

    @fuzz(sizes, sizes, st.one_of(st.just(1), sizes), st.integers(0, 3))
    def holds(ranks, ep_size, micro_batch_size, zero_stage):
        overrides = [
            f"parallel.nproc_per_node={ranks}",
            f"parallel.ep_size={ep_size}",
            f"micro_batch_size={micro_batch_size}",
            f"deepspeed=zero{zero_stage}",
        ]
        positive = min(ranks, ep_size, micro_batch_size) > 0
        possible = positive and ROWS % (ranks * micro_batch_size) == ranks % ep_size == EXPERTS % ep_size == 0
        if not possible:
            with pytest.raises(ConfigError):
                resumed(run_dir, overrides)
            return
        config = resumed(run_dir, overrides)
        allowed.append(config)
        assert (config.world_size, config.parallel.ep_size) == (ranks, ep_size)
        assert (config.zero_stage, config.micro_batch_size) == (zero_stage, micro_batch_size)

    assert len(allowed) > 10


KEYS = [
    "parallel.nproc_per_node",
    "parallel",
    "deepspeed",
    "deepspeed.zero_optimization.stage",
    "checkpoint.keep",
]
KEYS += [
    "device",
    "tracker.tags",
    "device.x",
    "parallel..x",
    "parallel[0]",
    "tracker.",
    "deepspeed.[",
    "name",
    "",
]
TEXTS = [
    "",
    "1",
    "-1",
    "zero1",
    "nan",
    "null",
    "???",
    "{",
    "[1",
    "[a,b]",
    "{a: 1}",
    "${nope}",
    "${seed}",
    "a: b: c",
]
TEXTS += [
    "!!python/name:os.system",
    "!!binary x",
    "*a",
    "&a",
    "\t",
    "\0",
    "\ud800",
    "a=b",
    "1_0",
    "0b2",
    "%",
    "@",
]


@pytest.mark.fuzzing(80, 2000)
def test_any_override_is_taken_or_refused(fuzz, run_dir):
    values = st.one_of(st.sampled_from(TEXTS), st.text(max_size=5))
    one = st.builds("{}{}{}".format, st.one_of(st.sampled_from(KEYS), values), st.just("="), values)

    @fuzz(st.lists(st.one_of(one, one, values), min_size=1, max_size=2))
    def holds(overrides):
        with suppress(ConfigError):
            resumed(run_dir, overrides)


@pytest.mark.fuzzing(40, 1000)
def test_each_group_of_ranks_holds_each_expert_once(fuzz):
    @fuzz(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3))
    def holds(ep_size, groups, each):
        experts, ranks = ep_size * each, ep_size * groups
        plan = ParallelPlan(ranks, ep_size, 1, ranks)
        assert plan.problems(experts) == []
        held = []
        for rank in range(ranks):
            config = SimpleNamespace(  # the keys of ModelConfig that a block reads
                hidden_size=2,
                num_experts=experts,
                num_experts_per_tok=1,
                moe_intermediate_size=1,
                norm_topk_prob=True,
                shared_expert_intermediate_size=0,
                shared_expert_gate=False,
            )
            block = MoEBlock(config, "loop")
            numbers = torch.arange(experts, dtype=torch.float32)
            block.experts.down_proj.data = numbers.view(-1, 1, 1).expand_as(block.experts.down_proj).clone()
            whole = nn.ModuleList([block])
            kind = LocalDispatcher()
            apply_expert_parallel(whole, ep_rank=plan.ep_rank(rank), ep_size=ep_size, dispatcher=kind)
            held.append(block.experts.down_proj[:, 0, 0].tolist())
        for first in range(0, ranks, ep_size):
            of_group = held[first : first + ep_size]
            assert list(itertools.chain(*of_group)) == list(range(experts))
            assert {len(numbers) for numbers in of_group} == {each}


PARAMETERS = {"model.layers.0.mlp.experts.down_proj": 60, "lm_head.weight": 35, "norm.weight": 1}
FIELDS = ("master", "exp_avg")


def values_of(name: str, field: str) -> torch.Tensor:
    """A different number for each element."""
    start = 1000 * list(PARAMETERS).index(name) + 100 * FIELDS.index(field) + 1
    return torch.arange(start, start + PARAMETERS[name], dtype=torch.float32)


def pieces(cuts: dict[str, list[int]], filled: bool) -> list[Fragment]:
    """The parameters, cut at these places."""
    found = []
    for name, size in PARAMETERS.items():
        borders = [0, *sorted({cut % size for cut in cuts[name]} - {0}), size]
        for start, stop in itertools.pairwise(borders):
            state = {field: values_of(name, field)[start:stop] for field in FIELDS}
            if not filled:
                state = {field: torch.zeros(stop - start) for field in FIELDS}
            found.append(Fragment(name, start, state, True))
    return found


@pytest.mark.fuzzing(60, 2000)
def test_states_written_on_one_layout_are_read_on_any_other(fuzz, tmp_path):
    numbers = itertools.count()
    cuts = st.fixed_dictionaries({name: st.lists(st.integers(0, 99), max_size=4) for name in PARAMETERS})
    ranks = st.lists(st.integers(0, 3), min_size=20, max_size=20)

    @fuzz(cuts, cuts, ranks, ranks, st.integers(0, 3))
    def holds(before, after, writers, readers, lost):
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        written = list(zip(pieces(before, True), writers, strict=False))
        files = [folder / f"rank-{rank}.safetensors" for rank in range(4)]
        for rank, path in enumerate(files):
            write_fragments(path, [fragment for fragment, owner in written if owner == rank])
        wanted = list(zip(pieces(after, False), readers, strict=False))
        for rank in range(4):  # a rank begins with its own file
            mine = [fragment for fragment, owner in wanted if owner == rank]
            fill_fragments(mine, files[rank:] + files[:rank])
        for fragment, _ in wanted:
            for field, view in fragment.state.items():
                stop = fragment.start + len(view)
                assert torch.equal(view, values_of(fragment.parameter, field)[fragment.start : stop])
        absent = {fragment.parameter for fragment, owner in written if owner == lost}
        if absent:
            with pytest.raises(ValueError, match="files lack elements of") as error:
                fill_fragments(pieces(after, False), [path for path in files if path != files[lost]])
            assert all(f"{name} ({field})" in str(error.value) for name in absent for field in FIELDS)


def test_a_huge_number_of_ranks_is_refused_at_once():
    plan = ParallelPlan(10**12, 10**12 - 1, 1, 1)
    found = plan.problems(10**12)
    assert len(found) == 3
    assert (
        "parallel.ep_size=999999999999 does not divide the 1000000000000 ranks; use 1, 2, 4, 5, 8" in found[0]
    )
