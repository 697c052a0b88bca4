"""Steps with drawn gradients against AdamW by hand: weights without a gradient, a step done again, clipping,
a rate of its own for each step.

The gradients are small integers times a power of two, whose fp32 sums are exact in any order.
"""

import zlib
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from layouts import RATE, SmallRun
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MICRO_BATCHES, RANKS, LIMIT = 4, 2, 100.0
OVERRIDES = ["micro_batch_size=2", "parallel.ep_size=2", "balance.mode=micro_batch"]
OVERRIDES += [f"optimizer.max_grad_norm={LIMIT}", "model.hidden_size=30"]  # 30: flat buffers have padding
ATTEMPTS, BROKEN, SMALL = 6, 3, (2, 5)  # the gradients of attempt 3 are not finite; those of 2 and 5 small
LAST = "model.norm"
# parts of names, attempt, micro-batch and rank without a gradient; None stands for all
IDLE: list[tuple[str, int, int | None, int | None]] = [
    ("q_proj", 0, 3, None),
    ("o_proj", 1, 0, None),
    (LAST, 1, None, None),
    ("layers.1.mlp.experts", 2, None, 1),
    ("lm_head", 2, 0, 0),
    (LAST, 4, None, None),  # and its gradient in the broken attempt was NaN
]


def is_idle(name: str, *place: int) -> bool:
    """Whether a weight has no gradient in this attempt, in this micro-batch, on this rank."""
    return any(
        part in name and all(b in (None, a) for a, b in zip(place, at, strict=True)) for part, *at in IDLE
    )


def drawn(name: str, weight: Tensor, attempt: int, micro_batch: int, rank: int) -> Tensor:
    """The gradient of a weight in one backward, in bf16."""
    if is_idle(name, attempt, micro_batch, rank):
        return torch.zeros_like(weight)
    if attempt == BROKEN and rank == 1 and LAST in name:
        return torch.full_like(weight, torch.nan)
    seed = zlib.crc32(f"{name} {attempt} {micro_batch} {rank}".encode())
    values = torch.randint(-8, 9, weight.shape, generator=torch.Generator().manual_seed(seed))
    return (values * (2.0**-8 if attempt in SMALL else 1.0)).to(weight.dtype)


def total(name: str, weight: Tensor, attempt: int, ranks: list[int]) -> Tensor:
    """The sum over micro-batches and ranks, in fp32."""
    parts = [drawn(name, weight, attempt, m, rank) for m in range(MICRO_BATCHES) for rank in ranks]
    return torch.stack(parts).float().sum(0)


class ByHand:
    """What a rank holds of the weights, updated by AdamW from whole gradients that are clipped explicitly."""

    def __init__(self, run: SmallRun) -> None:
        self.weights = dict(run.engine.module.named_parameters())
        self.places = {n: place for n, p in self.weights.items() if (place := run.engine._locate(p))}
        self.masters: dict[str, torch.nn.Parameter] = {}
        groups = []
        for name, (flat, offset, _, numel) in self.places.items():
            held = flat.detach().flatten()[offset : offset + numel].clone()
            self.masters[name] = torch.nn.Parameter(held)
            ours = run.engine._engine.basic_optimizer.param_groups
            decay = next(g["weight_decay"] for g in ours if any(p is flat for p in g["params"]))
            groups.append({"params": [self.masters[name]], "weight_decay": decay})
        given = {"betas": tuple(run.config.optimizer.betas), "eps": run.config.optimizer.eps}
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, foreach=False, **given)

    def gradients(self, attempt: int) -> tuple[dict[str, Tensor], float]:
        """This rank's whole gradients, and the global norm."""
        found, squares = {}, 0.0
        for name, weight in self.weights.items():
            apart = ".experts." in name
            sums = [total(name, weight, attempt, [r] if apart else [0, 1]) for r in range(RANKS)]
            found[name] = sums[dist.get_rank()]
            squares += sum(float(one.double().square().sum()) for one in (sums if apart else sums[:1]))
        return found, squares**0.5

    def step(self, gradients: dict[str, Tensor], norm: float, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        scale = min(1.0, LIMIT / (norm + 1e-6))
        for name, master in self.masters.items():
            _, _, start, numel = self.places[name]
            master.grad = gradients[name].flatten()[start : start + numel] * scale
        self.optimizer.step()


def attempts_of(stage: int, dtype: str) -> list[str]:
    """Everything that differs from the run by hand."""
    run = SmallRun(*OVERRIDES, f"deepspeed=zero{stage}", f"dtype={dtype}")
    assert run.plan.gradient_accumulation_steps == MICRO_BATCHES
    hand, rank, wrong = ByHand(run), dist.get_rank(), []
    if stage == 1 and rank == 1:
        assert any(run.engine._engine.optimizer.group_paddings)
    attempt, forwards, expected = 0, 0, {}

    def choose(*_: object) -> None:
        nonlocal forwards
        for name, weight in hand.weights.items():
            weight.requires_grad_(not is_idle(name, attempt, forwards, rank))
        forwards += 1

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if attempt == BROKEN:
            return
        held = {id(p): p.grad.clone().flatten() for g in optimizer.param_groups for p in g["params"]}
        for name, (flat, offset, start, numel) in hand.places.items():
            found = held[id(flat)][offset : offset + numel]
            if not torch.equal(found, expected[name].flatten()[start : start + numel]):
                wrong.append(f"attempt {attempt}: the sum of {name}")
            found.zero_()
        wrong.extend(f"attempt {attempt}: padding" for rest in held.values() if rest.any())

    for name, weight in hand.weights.items():

        def replaced(_: Tensor, name: str = name, weight: Tensor = weight) -> Tensor:
            return drawn(name, weight, attempt, forwards - 1, rank)

        weight.register_hook(replaced)
    run.engine.module.register_forward_pre_hook(choose)
    run.engine._engine.basic_optimizer.register_step_pre_hook(look)
    norms = []
    for attempt in range(ATTEMPTS):
        forwards = 0
        expected, norm = hand.gradients(attempt)
        norms.append(norm)
        rate = RATE / (1 + attempt)
        (found,) = run.train(range(attempt, attempt + 1), rate=rate)["grad_norms"]
        if attempt != BROKEN:
            hand.step(expected, norm, rate)
        if found != pytest.approx(norm, rel=1e-5, nan_ok=True):
            wrong.append(f"attempt {attempt}: the norm is {found} instead of {norm}")
        for name, (flat, offset, _, numel) in hand.places.items():
            weights = flat.detach().flatten()[offset : offset + numel]
            if not torch.allclose(weights, hand.masters[name], rtol=1e-6, atol=1e-7):
                wrong.append(f"attempt {attempt}: the weights of {name}")
    run.engine.close()
    finite = [norm for norm in norms if norm == norm]
    assert len(finite) == ATTEMPTS - 1
    assert min(finite) < LIMIT < max(finite)
    return wrong


def attempts_of_all(cases: list[tuple[int, str]]) -> dict[tuple[int, str], list[str]]:
    return {case: attempts_of(*case) for case in cases}


def test_steps_with_idle_weights_and_one_done_again_equal_adamw_by_hand():
    cases = [(0, "fp32"), (0, "bf16"), (1, "bf16")]
    for wrong in run_ranks(attempts_of_all, RANKS, cases, timeout=240):
        assert wrong == {case: [] for case in cases}


class Passes(TorchDispatchMode):
    """Counts, by operator, the elements of the gradient sums that it reads or writes."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        self._optimizer = optimizer
        self.elements: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        sums = {sum_.untyped_storage().data_ptr() for sum_ in sums_of(self._optimizer)}

        def count(values: Any) -> int:
            tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
            return sum(t.numel() for t in tensors if t.untyped_storage().data_ptr() in sums)

        is_view = not func._schema.is_mutable and count(result) > 0
        if (touched := count((args, kwargs))) and not is_view:
            name = func.overloadpacket.__name__
            self.elements[name] = self.elements.get(name, 0) + touched
        return result


def sums_of(optimizer: Any) -> list[Tensor]:
    """The gradient sums that an optimizer of DeepSpeed holds now."""
    if flat := getattr(optimizer, "fp32_groups_gradients_flat", None):
        return flat
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def passes_of_a_step(stage: int, limit: float) -> tuple[int, dict[str, int]]:
    """The number of weights, and what a step with two micro-batches does with their gradient sums."""
    keys = ["dtype=bf16", "micro_batch_size=8", f"deepspeed=zero{stage}", f"optimizer.max_grad_norm={limit}"]
    run = SmallRun(*keys)
    run.train(range(1))
    with Passes(run.engine._engine.optimizer) as passes:
        run.train(range(1, 2))
    run.engine.close()
    return sum(p.numel() for p in run.engine.module.parameters()), passes.elements


def passes_of_all(cases: list[tuple[int, float]]) -> dict[tuple[int, float], tuple[int, dict[str, int]]]:
    return {case: passes_of_a_step(*case) for case in cases}


def test_a_step_makes_no_pass_that_only_zeroes_or_only_clips():
    cases = list(product((0, 1), (1e-3, 1e3)))  # the first limit clips, the second does not
    [found] = run_ranks(passes_of_all, 1, cases)
    once = ("copy_", "add_", "_foreach_norm", "_fused_adamw_")  # two micro-batches, the norm, the update
    for case, (weights, elements) in found.items():
        assert elements == dict.fromkeys(once, weights), case
