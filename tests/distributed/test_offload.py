"""Optimizer states in host memory (`offload_optimizer.device=cpu`): same training, same checkpoints."""

from pathlib import Path

import pytest
from commands import prepare_corpus
from harness import run_ranks
from layouts import Outcome, SmallRun, deviation, run_many

from trainer.checkpoints.saving import Checkpoints

OFFLOAD = "+deepspeed.zero_optimization.offload_optimizer.device=cpu"
LAYOUT = ["parallel.ep_size=2", "micro_batch_size=4"]
SAVED, STEPS = 2, 4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_offload_trains_as_without(dtype):
    layouts = [[*LAYOUT, f"dtype={dtype}", f"deepspeed=zero{stage}"] for stage in (1, 2, 3)]
    both = [layout + more for layout in layouts for more in ([], [OFFLOAD])]
    outcomes = run_ranks(run_many, 2, both)[0]
    for here, offloaded in zip(outcomes[::2], outcomes[1::2], strict=True):
        found = deviation(offloaded, here)
        assert max(found.values()) < 1e-5, found


def save_and_go_on(folder: str, data: str) -> list[Outcome]:
    """The steps after a checkpoint of an offloaded run, done by that run and by runs that restore it."""
    keys = [*LAYOUT, f"data.dir={data}", "checkpoint.background=false"]

    def checkpoints(run: SmallRun) -> Checkpoints:
        return Checkpoints(Path(folder), 1, run.config, run.plan, run.ranks, print)

    first = SmallRun(*keys, "deepspeed=zero2", OFFLOAD)
    first.train(range(SAVED))
    checkpoints(first).save(first.engine, first.balance, SAVED, {})
    outcomes = [first.train(range(SAVED, STEPS))]
    first.engine.close()
    for layout in (["deepspeed=zero2", OFFLOAD], ["deepspeed=zero3", OFFLOAD], ["deepspeed=zero1"]):
        run = SmallRun(*keys, *layout, "model.initializer_range=0.5")
        assert checkpoints(run).load_latest(run.engine, run.balance) == (SAVED, {})
        outcomes.append(run.train(range(SAVED, STEPS)))
        run.engine.close()
    return outcomes


def test_a_checkpoint_of_an_offloaded_run_goes_on_anywhere(tmp_path):
    prepare_corpus(tmp_path)
    run_dir = str(tmp_path / "run")
    straight, same, *others = run_ranks(save_and_go_on, 2, run_dir, f"{tmp_path}/prepared", timeout=200)[0]
    assert max(deviation(same, straight).values()) == 0
    for other in others:
        found = deviation(other, straight)
        assert max(found.values()) < 1e-5, found
