"""Training on one GPU: layouts, dtypes, offload, resume, repeated runs. fp32 runs are the reference."""

import math

import pytest
import torch
from layouts import DENSE, ROWS, Outcome, SmallRun, deviation, train_small
from one_gpu import PLACE

from trainer.checkpoints.saving import Checkpoints
from trainer.engine.optimizer import KINDS

GROUPED = "experts.backend=grouped"
DENSE_MODEL = ["model=tiny_dense", *DENSE]
STAGES = [f"deepspeed=zero{stage}" for stage in range(4)]
OFFLOAD = "+deepspeed.zero_optimization.offload_optimizer.device=cpu"
_fp32: dict[str, Outcome] = {}


def in_fp32(*model: str) -> Outcome:
    """The outcome of three steps of a model in fp32 without ZeRO."""
    key = " ".join(model)
    if key not in _fp32:
        _fp32[key] = train_small(*model, "deepspeed=zero0", "micro_batch_size=4", device=PLACE)
    return _fp32[key]


@pytest.mark.parametrize("recompute", ["none", "experts", "local", "full"])
@pytest.mark.parametrize("stage", STAGES)
def test_layouts_agree_in_fp32(stage, recompute):
    outcome = train_small(stage, f"recompute={recompute}", "micro_batch_size=4", device=PLACE)
    found = deviation(outcome, in_fp32())
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("stage", STAGES)
def test_dense_models(stage):
    outcome = train_small(*DENSE_MODEL, stage, "micro_batch_size=4", device=PLACE)
    assert max(deviation(outcome, in_fp32(*DENSE_MODEL)).values()) < 1e-5


@pytest.mark.parametrize(
    ("model", "recompute"),
    [*(([GROUPED], recompute) for recompute in ("none", "experts", "local", "full")), (DENSE_MODEL, "none")],
    ids=["none", "experts", "local", "full", "dense"],
)
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_follows_fp32(stage, model, recompute):
    """bf16 adds an error of a few thousandths; a wrong factor, gradient or Adam step would add more."""
    run = SmallRun(*model, stage, f"recompute={recompute}", "dtype=bf16", "micro_batch_size=4", device=PLACE)
    outcome, expected = run.train(range(3)), in_fp32(*(model if model == DENSE_MODEL else []))
    masters = {name: torch.empty(p.numel()) for name, p in outcome["parameters"].items()}
    for part in run.engine.fragments():
        master = part.state["master"]
        masters[part.parameter][part.start : part.start + len(master)] = master.cpu()
    run.engine.close()
    for key, bound in (("losses", 0.02), ("grad_norms", 0.05)):
        assert all(
            math.isclose(*pair, rel_tol=bound) for pair in zip(outcome[key], expected[key], strict=True)
        )
    for name, weight in outcome["parameters"].items():
        assert torch.equal(masters[name].bfloat16().float(), weight.flatten()), f"{name} is not the master"
    assert any((m != m.bfloat16().float()).any() for m in masters.values()), "masters must be fp32"


@pytest.mark.parametrize("stage", STAGES)
def test_sums_of_bf16_gradients_are_exact(stage):
    """As tests/distributed/test_gradient_sums.py: the sum of 256 and seven times 1 is not a bf16 number."""
    keys = ["dtype=bf16", "micro_batch_size=2", "optimizer.max_grad_norm=0", "balance.mode=micro_batch"]
    run = SmallRun(stage, GROUPED, *keys, device=PLACE)
    forwards, found = [0], {kind: set() for kind in KINDS}

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    found[group["kind"]] |= set(parameter.grad.unique().tolist())

    def count(*_: object) -> None:
        forwards[0] += 1

    for parameter in run.engine.module.parameters():
        parameter.register_hook(lambda g: torch.full_like(g, 256 if forwards[0] == 1 else 1))
    run.engine.module.register_forward_pre_hook(count)
    run.engine._engine.basic_optimizer.register_step_pre_hook(look)
    run.train(range(1))
    run.engine.close()
    assert {kind: values - {0.0} for kind, values in found.items()} == {
        kind: {256.0 + ROWS // 2 - 1} for kind in KINDS
    }


@pytest.mark.parametrize("stage", STAGES[1:])
def test_offloaded_optimizer(stage):
    outcome = train_small(stage, OFFLOAD, "micro_batch_size=4", device=PLACE)
    found = deviation(outcome, in_fp32())
    assert max(found.values()) < 1e-5, found


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("stage", STAGES[1:])
def test_resume_goes_on_bit_for_bit(stage, small_corpus, tmp_path):
    keys = [stage, "dtype=bf16", GROUPED, "micro_batch_size=4", f"data.dir={small_corpus}/prepared"]
    straight = SmallRun(*keys, device=PLACE)
    straight.train(range(2))
    folder = [tmp_path, 1, straight.config, straight.plan, straight.ranks, print]
    saver = Checkpoints(*folder)
    saver.save(straight.engine, straight.balance, 2, {})
    expected = straight.train(range(2, 4))
    saver.finish()
    straight.engine.close()
    resumed = SmallRun(*keys, "model.initializer_range=0.5", device=PLACE)
    assert Checkpoints(*folder).load_latest(resumed.engine, resumed.balance) == (2, {})
    found = deviation(resumed.train(range(2, 4)), expected)
    resumed.engine.close()
    assert max(found.values()) == 0, found


@pytest.mark.usefixtures("deterministic")
def test_two_equal_runs_are_equal_bit_for_bit():
    keys = ["dtype=bf16", GROUPED, "micro_batch_size=8", "recompute=full"]
    one, other = (train_small(*keys, steps=20, device=PLACE) for _ in range(2))
    assert max(deviation(one, other).values()) == 0


def test_how_far_two_runs_differ_otherwise():
    """Prints the difference and checks nothing: flash attention's backward adds in no fixed order."""
    keys = ["dtype=bf16", GROUPED, "micro_batch_size=8"]
    one, other = (train_small(*keys, steps=20, device=PLACE) for _ in range(2))
    print(f"\nwithout deterministic, 20 steps in bf16: {deviation(one, other)}")
