"""Memory and synchronizations of a step on one GPU, and a run with the commands of a user."""

import gc
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from layouts import DENSE, SmallRun, micro_batches
from one_gpu import ON_GPU, PLACE

from trainer.engine.loss import agree_on_totals
from trainer.models import bytes_per_rank
from trainer.stages.supervised import Supervised
from trainer.train import train_step

ROOT = Path(__file__).parents[2]
STAGES = [f"deepspeed=zero{stage}" for stage in range(4)]
BIG = ["model.hidden_size=512", "model.num_attention_heads=8", "model.num_key_value_heads=2"]
BIG += ["model.head_dim=64", "model.num_experts=32", "model.moe_intermediate_size=256"]
ZERO = "++deepspeed.zero_optimization"
NO_BUFFERS = [f"{ZERO}.reduce_bucket_size=10000", f"{ZERO}.sub_group_size=10000"]
NO_BUFFERS += [f"{ZERO}.stage3_param_persistence_threshold=1000"]


def allocated() -> int:
    """Bytes of live tensors on the GPU, without the cuBLAS workspaces."""
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


@pytest.mark.skipif(not ON_GPU, reason="reads the CUDA allocator")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", STAGES)
def test_memory_is_what_the_table_says(stage, dtype):
    gc.collect()  # frees the engines of earlier tests
    before, seen = allocated(), []
    buffers = [] if stage.endswith("0") else NO_BUFFERS
    run = SmallRun(*BIG, stage, f"dtype={dtype}", "micro_batch_size=4", *buffers, device=PLACE)
    step = run.engine._engine.step

    def look_and_step() -> None:
        seen.append(allocated() - before)
        step()

    run.engine._engine.step = look_and_step
    run.train(range(1))
    seen.clear()
    run.train(range(1, 2))
    said = sum(
        bytes_per_rank(run.config.model, zero_stage=int(stage[-1]), ep_size=1, world_size=1, dtype=dtype)
    )
    run.engine.close()
    assert abs(max(seen) / said - 1) < 0.02, (max(seen), said)


# the host waits for the gradient norm here, because it decides whether the weights are updated
NORMS = {("trainer/engine/gradients.py", "step"), ("trainer/engine/gradients.py", "reduce_and_clip")}


@pytest.mark.skipif(not ON_GPU, reason="CUDA reports the synchronizations")
@pytest.mark.parametrize(
    "keys", [["deepspeed=zero1"], ["deepspeed=zero0"], ["model=tiny_dense", *DENSE, "deepspeed=zero1"]]
)
def test_a_step_waits_for_its_norm_alone(keys):
    run = SmallRun(*keys, "dtype=bf16", "micro_batch_size=4", device=PLACE)
    run.train(range(2))
    batches = micro_batches(run.plan, 0, 2)
    totals = agree_on_totals(batches, False)
    batches = [batch.to(PLACE) for batch in batches]
    waits: list[tuple[str, str]] = []

    def listen(message: Warning | str, *_: object, **__: object) -> None:
        if "synchronizing CUDA operation" in str(message):
            frames = [frame for frame in traceback.extract_stack() if str(ROOT) in frame.filename]
            ours = [("autograd", ""), *((frame.filename, frame.name) for frame in frames)]
            ours = [place for place in ours if "/tests/" not in place[0] and "/.venv/" not in place[0]]
            waits.append((ours[-1][0].removeprefix(f"{ROOT}/"), ours[-1][1]))

    with warnings.catch_warnings():
        torch.cuda.set_sync_debug_mode("warn")  # this call itself warns that it is a prototype
        warnings.simplefilter("always")
        warnings.showwarning = listen
        train_step(run.engine, run.balance, Supervised.loss_shares, batches, totals, 1e-3)
        torch.cuda.set_sync_debug_mode("default")
    run.engine.close()
    assert set(waits) <= NORMS, waits
    assert waits, "the test must see the wait for the norm"


def test_a_run_as_a_user_types_it(typed_commands):
    typed, name = typed_commands, torch.cuda.get_device_name() if ON_GPU else "the CPU"
    assert f"on {'1 ' if ON_GPU else ''}{name} (experts {'grouped' if ON_GPU else 'loop'}" in typed["train"]
    assert "going on after step 4" in typed["resume"]
    assert "The" in typed["generate"]
    assert "loss/validation" in typed["evaluate"]
    exact = ("loss", "balance_loss", "grad_norm", "learning_rate", "max_violation")
    first, second = (
        {line["step"]: [line[key] for key in exact] for line in typed["steps"] if line["attempt"] == attempt}
        for attempt in (1, 2)
    )
    assert sorted(second) == [5, 6, 7, 8]
    assert second == {step: first[step] for step in second}, "a deterministic run must resume bit for bit"
    assert first[8][0] < first[1][0]
