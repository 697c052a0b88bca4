"""The step of one contender of `make bench-gpu`, in its own process: prints a line of JSON per figure.

`python tests/bench/gpu_step.py ours|transformers SECTION,... UNTIL [tiny]`: sections are step, parts and
kernels; UNTIL is the time (seconds since 1970) after which nothing new is started. `tiny` is a rehearsal.
"""

import contextlib
import gc
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from contender import one_batch, run_config, time_parts
from gpu_alone import TINY, WHOLE, is_tiny, print_card, synchronize, tell
from torch import Tensor, nn
from work import BETAS, CLIP, DECAY, EPS, LEARNING_RATE, Work, device

from moe.kernels import support

LARGE = 100e9  # bytes of a card that holds 8 layers with their optimizer states, and 16,384 tokens
Step = Callable[[], Any]

# What a kernel does, by a pattern of its name; the first match counts.
KINDS = {
    "our Triton kernels": "^_[a-z_]+$",
    "communication": "nccl",
    "attention": "flash|fmha|attention|cudnn.*sdpa|mha",
    "AdamW": "adam",
    "clipping and norms of gradients": "multi_tensor_apply|foreach",
    "grouped products": "group",
    "other products": "gemm|nvjet|cutlass|cublas|xmma|::mm|addmm|bmm",
    "sorting, gathering, scattering": "sort|radix|scan|gather|scatter|index|embedding|searchsorted",
    "copies and casts": "copy|memcpy|to_copy|cat",
    "zeros": "fill|memset|zero",
    "reductions": "reduce|softmax|logsumexp|norm",
    "elementwise": "elementwise|vectorized|unrolled",
}


def work_of(depth: int) -> Work:
    """The work of one step of a contender with `depth` layers."""
    if is_tiny():
        return Work(**TINY, layers=depth, zero_stage=1)
    rows = 4 if _memory() >= LARGE else 2
    return Work(**WHOLE, rows=rows, seq_len=4096, document=4096, layers=depth, zero_stage=1, backend="auto")


def depths(masters_of_peer: bool) -> tuple[int, int]:
    """The two depths; the difference of their times gives the time of a layer."""
    if is_tiny():
        return 1, 2
    return 2, (6 if masters_of_peer else 8) if _memory() >= LARGE else (3 if masters_of_peer else 4)


def _memory() -> int:
    return torch.cuda.get_device_properties(0).total_memory


def measured(step: Step, steps: int) -> dict[str, Any]:
    """Seconds of a step, the mean of several after warm-up, and the peak memory; or why it failed."""
    try:
        for _ in range(2 if steps > 2 else 1):
            step()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        seconds = (time.perf_counter() - start) / steps
    except torch.OutOfMemoryError:
        return {"seconds": None, "why": "out of memory"}
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"seconds": seconds, "peak_gib": peak / 2**30}


class Ours:
    """The step of trainer.train at one depth, by recompute and number of micro-batches."""

    def __init__(self, depth: int) -> None:
        from trainer.checkpoints.assemble import build_model
        from trainer.engine.engine import Engine
        from trainer.engine.optimizer import build_optimizer

        self.work = work_of(depth)
        self.batch = one_batch(self.work, 0, 1).to(RANKS.device)
        config = run_config(self.work, 1)
        plan = config.plan(1)
        model = build_model(config, plan, RANKS)
        self.engine = Engine(model, build_optimizer(model, config.optimizer), config, plan, RANKS)

    def step(self, recompute: str = "none", micro_batches: int = 1, balance_mode: str = "exact") -> Step:
        """The step under these settings, from its next call on."""
        from trainer.engine.loss import agree_on_totals, build_balance
        from trainer.stages.supervised import Supervised
        from trainer.train import train_step

        work = replace(self.work, micro_batches=micro_batches)
        config = replace(run_config(work, 1), recompute=recompute)
        config = replace(config, balance=replace(config.balance, mode=balance_mode))
        decoder = self.engine.module.model
        decoder.recompute_layers = recompute == "full"
        for layer in decoder.layers:
            layer.recompute = layer.mlp.recompute = recompute
            layer.mlp.experts.recompute = recompute in ("experts", "local")
        self.engine._engine.set_train_batch_size(work.rows * micro_batches)
        self.engine._engine.micro_steps = 0  # else gradient accumulation would start in the middle
        balance = build_balance(config, config.plan(1), RANKS.device)
        batches = [self.batch] * micro_batches

        def step() -> None:
            totals = agree_on_totals(batches, False)
            train_step(self.engine, balance, Supervised.loss_shares, batches, totals, LEARNING_RATE)

        return step


class Transformers:
    """transformers' model as published: grouped_mm experts, SDPA, torch's clipping and fused AdamW.

    With `masters` it trains as ours does: fp32 master weights, gradient sums and moments.
    """

    def __init__(self, depth: int, masters: bool) -> None:
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        self.work, self.masters = work_of(depth), masters
        keys = self.work.model_keys()
        config = Qwen3MoeConfig(**keys, attn_implementation="sdpa", output_router_logits=True)
        config._experts_implementation = "grouped_mm"
        config.use_cache = False
        torch.manual_seed(0)
        with torch.device(device()):
            self.model = Qwen3MoeForCausalLM._from_config(config, dtype=self.work.torch_dtype)
        self.model.train()
        self.weights = list(self.model.parameters())
        self.stepped = self.weights
        if masters:
            self.stepped = [nn.Parameter(weight.detach().float()) for weight in self.weights]
            for weight, master in zip(self.weights, self.stepped, strict=True):
                weight.register_post_accumulate_grad_hook(_adding_to(master))
        kinds: dict[str, Any] = {"weight_decay": DECAY, "fused": True}
        self.optimizer = torch.optim.AdamW(self.stepped, LEARNING_RATE, BETAS, EPS, **kinds)

    def step(self, recompute: str = "none", micro_batches: int = 1) -> Step:
        """The step under these settings."""
        if recompute == "full":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        tokens = self.work.tokens(0, 1)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

        def step() -> None:
            for _ in range(micro_batches):
                (self.model(inputs, labels=labels, shift_labels=labels).loss / micro_batches).backward()
            torch.nn.utils.clip_grad_norm_(self.stepped, CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
            with torch.no_grad():
                if self.masters:
                    torch._foreach_copy_(self.weights, self.stepped)

        return step


def _adding_to(master: nn.Parameter) -> Callable[[Tensor], None]:
    def add(weight: Tensor) -> None:
        assert weight.grad is not None
        master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
        weight.grad = None

    return torch.no_grad()(add)


def configurations(name: str) -> Iterator[dict[str, Any]]:
    """The settings to measure for a contender, the most important first."""
    yield {}
    yield {"micro_batches": 4}
    if name != "transformers, fp32 states":
        yield {"recompute": "full"}
    if name == "ours":
        yield {"recompute": "full", "micro_batches": 4}
        yield {"recompute": "local"}
        yield {"micro_batches": 4, "balance_mode": "micro_batch"}
        yield {"passes": "torch"}


def measure_all(name: str, build: Callable[[int], Any], sections: list[str], until: float) -> None:
    """The configurations at both depths; parts and kernels at the larger one."""
    low, high = depths(name == "transformers, fp32 states")
    for depth in (high, low) if "step" in sections else (high,):
        if time.time() > until:
            return
        try:
            contender = build(depth)
        except torch.OutOfMemoryError:
            tell("step", contender=name, layers=depth, seconds=None, why="out of memory")
            continue
        work = contender.work
        for keys in configurations(name) if "step" in sections else ():
            if time.time() < until:
                settings = {key: value for key, value in keys.items() if key != "passes"}
                with support.turned_off() if "passes" in keys else contextlib.nullcontext():
                    result = measured(contender.step(**settings), 2 if "micro_batches" in keys else 5)
                told = {"contender": name, "layers": depth, "rows": work.rows, "seq_len": work.seq_len}
                told |= {"recompute": "none", "micro_batches": 1, "flops_48": _flops(work, keys)}
                tell("step", **told | keys | result)
        if depth == high and name == "ours":
            if "kernels" in sections:
                tell("kernels", layers=depth, **kernels(contender.step()))
            if "parts" in sections:
                tell("parts", layers=depth, seconds=parts(contender))
            contender.engine.close()
        del contender
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            print(f"left after {name}: {torch.cuda.memory_allocated() / 2**30:.2f} GiB", file=sys.stderr)


def _flops(work: Work, keys: dict[str, Any]) -> float:
    """Model FLOPs of a step with all 48 layers, without recomputation."""
    from moe.config import ModelConfig

    whole = replace(work, layers=48).model_keys()
    model = ModelConfig.from_hf({"model_type": "qwen3_moe", **whole})
    return model.flops_per_token(work.document) * work.rows * work.seq_len * keys.get("micro_batches", 1)


def parts(contender: Ours) -> dict[str, float]:
    """Seconds of each part of a step, by the engine's clock."""
    time_parts(contender.engine)
    step, clock = contender.step(), contender.engine.clock
    step()
    clock.lap()
    clock.measuring = True
    step()
    return clock.lap()[2]


def kernels(step: Step) -> dict[str, Any]:
    """Milliseconds of a step by kind of kernel, and of the kernels that take the most."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    step()
    synchronize()
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        step()
        synchronize()
    wall, kinds, top = time.perf_counter() - start, defaultdict(float), []
    for event in profiler.key_averages():
        took = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000
        if took > 0:
            found = (kind for kind, pattern in KINDS.items() if re.search(pattern, event.key, re.IGNORECASE))
            kinds[next(found, "other")] += took
            top.append((event.key[:600], took, event.count))
    top.sort(key=lambda line: -line[1])
    return {"wall_ms": 1000 * wall, "kinds": dict(kinds), "top": top[:25]}


def main(name: str, sections: str, until: str, *_: str) -> None:
    """Measure one contender."""
    global RANKS
    wanted = sections.split(",")
    print_card()
    if name == "transformers":
        for label, masters in (("transformers", False), ("transformers, fp32 states", True)):
            measure_all(label, lambda depth, m=masters: Transformers(depth, m), wanted, float(until))
        return
    from trainer.engine.cpu_products import fast_products
    from trainer.engine.engine import init_deepspeed
    from trainer.ranks.runtime import Ranks

    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place | {"MASTER_PORT": "29547"})
    RANKS = Ranks.join()
    init_deepspeed(RANKS.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(fast_products(RANKS.device, torch.bfloat16))
        measure_all("ours", Ours, wanted, float(until))
    sys.stdout.flush()
    os._exit(0)


RANKS: Any = None  # of this process, once it has joined its group

if __name__ == "__main__":
    main(*sys.argv[1:])
