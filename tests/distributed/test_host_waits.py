"""In a training step the host waits for a GPU only where it must know a number of rows."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from harness import run_ranks
from layouts import FAMILY, MTP, ROWS, SEQ_LEN, micro_batches, small_config
from stand_in import DeviceError, stand_in

from moe.dispatch import AllToAllDispatcher
from moe.model import CausalLM
from moe.parallelize import apply_expert_parallel
from moe.router import TrainingRouting
from trainer.engine.gradients import reduce_and_clip
from trainer.engine.loss import agree_on_totals, build_balance
from trainer.engine.optimizer import build_optimizer
from trainer.monitor.metrics import OptimizerNorms, StepSums
from trainer.ranks.runtime import DTYPES
from trainer.stages.supervised import Supervised

BATCH = ["micro_batch_size=16", "dtype=bf16", "experts.backend=grouped"]
CASES = {
    "dense": FAMILY["qwen2"],
    "dense layers between": [*FAMILY["qwen3_moe"], "recompute=full", "balance.mode=buffer"],
    "shared expert": [*FAMILY["qwen2_moe"], "recompute=experts", "balance.bias_update_rate=0.01"],
    "without gate": [*FAMILY["shared_without_gate"], "balance.mode=prior_buffer"],
    "linear attention": [*FAMILY["qwen3_next"], "balance.mode=micro_batch"],
    "two tokens ahead": [MTP],
}
SLOTS = ROWS * SEQ_LEN * 2  # (token, expert) pairs of the micro-batch in a sparse layer


def step_on_stand_in(overrides: list[str], answer: int | None = None, dispatch: bool = False) -> list[str]:
    """Run one step of a small model on the stand-in for a GPU; returns where the host read from it."""
    config = small_config(*BATCH, *overrides)
    plan, model_config = config.plan(1), config.model
    routing = TrainingRouting(0.0, config.experts.capacity_factor, [])
    with torch.device("meta"):
        model = CausalLM(model_config, backend=config.experts.backend, recompute=config.recompute)
    if dispatch:
        dispatcher = AllToAllDispatcher(dist.group.WORLD, chunks=2)
        apply_expert_parallel(model, ep_rank=0, ep_size=1, dispatcher=dispatcher)
    with stand_in(answer) as device:
        place = torch.device(device.name)
        model.to(DTYPES[config.dtype]).to_empty(device=place)
        optimizer = build_optimizer(model, config.optimizer)
        OptimizerNorms(optimizer, config, plan)
        balance = build_balance(config, plan, place)
        batches = micro_batches(plan, 0, 0)
        totals = agree_on_totals(batches, False)
        sums = StepSums.zeros(model_config.num_moe_layers, model_config.num_experts, place)
        for batch in (batch.to(place) for batch in batches):
            inputs = (batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.token_mask, batch.labels)
            output = model(*inputs, selection_bias=balance.bias, routing=routing, lengths=batch.lengths)
            frequencies = None
            if output.router is not None:
                frequencies = balance.frequencies(output.router.tokens_per_expert, totals.tokens)
            shares = Supervised.loss_shares(batch, output, frequencies, totals)
            shares.total(config).backward()
            sums.add(shares, output.router)
        balance.end_step()
        optimizer.step()
    return device.reads


def told() -> dict[str, str]:
    """The error that the stand-in raises at each operation; empty if the operation is allowed."""
    said = {}
    with stand_in() as device:
        x, place = torch.ones(4, device=device.name), torch.device(device.name)
        operations: dict[str, Callable[[], object]] = {
            "item": x.sum().item,
            "truth": lambda: bool(x.sum()),
            "list": x.tolist,
            "mask": lambda: x[x > 0],
            "nonzero": x.nonzero,
            "repeats": lambda: x.repeat_interleave(x.long()),
            "to the host": x.cpu,
            "into the host": lambda: torch.empty(4).copy_(x),
            "from the host": lambda: torch.ones(4).to(place),
            "index of the host": lambda: x[torch.tensor([0, 1])],
            "scalar of the host": lambda: torch.stack([x.sum(), torch.zeros(())]),
            "sum with the host": lambda: x + torch.ones(4),
            "nothing": lambda: torch.ones(4).to(place, non_blocking=True) + x[x.long()] + 1,
        }
        for name, operation in operations.items():
            try:
                operation()
                said[name] = ""
            except DeviceError as error:
                said[name] = str(error)
    return said


def step_on_the_host() -> None:
    """AdamW's states are offloaded to the host; the sums of a logged step are on the device."""
    config = small_config()
    weights = torch.nn.Linear(3, 4)
    optimizer = build_optimizer(weights, config.optimizer)
    norms = OptimizerNorms(optimizer, config, config.plan(1))
    with stand_in() as device:
        norms.arm(torch.device(device.name), histograms=True)
        weights(torch.ones(2, 3)).sum().backward()
        optimizer.step()


def norm_of_a_dense_model() -> list[str]:
    """Without ZeRO and without experts, the norm is all that the host reads."""
    optimizer = torch.optim.AdamW([torch.ones(3)], fused=True)
    with stand_in(answer=1) as device:
        reduce_and_clip([torch.ones(3, device=device.name)], [], None, None, optimizer, max_norm=0.5)
    return device.reads


def everything() -> tuple[dict[str, str], dict[str, list[str]], list[str], list[str]]:
    assert norm_of_a_dense_model() == ["trainer/engine/gradients.py reduce_and_clip"]
    step_on_the_host()
    steps = {name: step_on_stand_in(overrides) for name, overrides in CASES.items()}
    spread = step_on_stand_in([], SLOTS // 2, dispatch=True)  # all experts are here: half the slots per chunk
    return told(), steps, spread, step_on_stand_in(["experts.capacity_factor=1.0"], SLOTS)


def test_a_step_waits_for_nothing_but_how_many_rows_there_are() -> None:
    """Any other wait raises DeviceError."""
    [(said, steps, spread, dropping)] = run_ranks(everything, 1, timeout=200)
    assert [name for name, problem in said.items() if not problem] == ["nothing"], said
    assert steps == {name: [] for name in CASES}
    assert set(spread) == {"moe/dispatch.py wait"}
    assert dropping == ["moe/dispatch.py __call__"] * 2, "once for each sparse layer"
