"""One contender of `make bench` in its own process: trains on random tokens, prints one line of JSON.

`python tests/bench/contender.py NAME [key=value ...]` with the keys of `Work`; RANK, WORLD_SIZE as torchrun.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import peers
import torch
import torch.distributed as dist
from work import BETAS, CLIP, DECAY, EPS, LEARNING_RATE, Work

UNTIL_THE_END = ExitStack()


def ours(work: Work) -> tuple[Callable[[], float], Any]:
    """The step of trainer.train, and its engine."""
    from trainer.checkpoints.assemble import build_model
    from trainer.engine.cpu_products import fast_products
    from trainer.engine.engine import Engine, init_deepspeed
    from trainer.engine.loss import agree_on_totals, build_balance
    from trainer.engine.optimizer import build_optimizer
    from trainer.ranks.runtime import Ranks
    from trainer.stages.supervised import Supervised
    from trainer.train import train_step

    ranks = Ranks.join()
    init_deepspeed(ranks.device)
    UNTIL_THE_END.enter_context(fast_products(ranks.device, work.torch_dtype))
    config = run_config(work, ranks.world_size)
    plan = config.plan(ranks.world_size)
    model = build_model(config, plan, ranks)
    engine = Engine(model, build_optimizer(model, config.optimizer), config, plan, ranks)
    balance = build_balance(config, plan, ranks.device)
    batch = one_batch(work, ranks.rank, ranks.world_size).to(ranks.device)

    def step() -> float:
        totals = agree_on_totals([batch], False)
        sums, _, _ = train_step(engine, balance, Supervised.loss_shares, [batch], totals, LEARNING_RATE)
        return float(sums.cross_entropy)

    return step, engine


def one_batch(work: Work, rank: int, world_size: int) -> Any:
    """This rank's rows as a `Batch` of our data pipeline."""
    from data_pipeline.loader import Batch

    tokens = work.tokens(rank, world_size).cpu()
    rows = len(tokens)
    return Batch.of(
        input_ids=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        position_ids=(torch.arange(work.seq_len) % work.document).repeat(rows, 1),
        cu_seqlens=torch.arange(0, rows * work.seq_len + 1, work.document, dtype=torch.int32),
        token_mask=torch.ones(rows, work.seq_len, dtype=torch.bool),
        rows=tuple(range(rows)),
    )


def time_parts(engine: Any) -> None:
    """Make the engine's clock measure forward and backward of each kind of module under one name."""
    from moe.attention import Attention
    from moe.block import MoEBlock
    from moe.experts import Experts
    from moe.model import LanguageModelHead
    from moe.router import Router

    names = {
        Attention: "attention",
        Router: "router",
        Experts: "experts",
        MoEBlock: "dispatch",  # the block without the parts inside it
        LanguageModelHead: "cross entropy",
        torch.nn.RMSNorm: "norms",
    }
    engine.clock.measuring = True
    for module in engine.module.modules():
        name = next((name for kind, name in names.items() if isinstance(module, kind)), None)
        if name is None or (
            name == "norms" and module.normalized_shape[0] != engine.module.config.hidden_size
        ):
            continue  # the norms of queries and keys count as attention
        spans: list[Any] = []

        def start(*_: Any, name: str = name, spans: list[Any] = spans) -> None:
            spans.append(engine.clock.part(name))
            spans[-1].__enter__()

        def stop(*_: Any, spans: list[Any] = spans) -> None:
            spans.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(start)
        module.register_forward_hook(stop)
        module.register_full_backward_pre_hook(start)
        module.register_full_backward_hook(stop)


def run_config(work: Work, world_size: int) -> Any:
    """The configuration of our run that does `work`."""
    from hydra import compose, initialize_config_module

    from trainer.settings.config import RunConfig

    keys = {f"model.{key}": value for key, value in work.model_keys().items()}
    keys |= {
        "dtype": work.dtype,
        "micro_batch_size": work.rows // world_size,
        "stage.seq_len": work.seq_len,
        "stage.global_batch_size": work.rows * work.micro_batches,
        "parallel.nproc_per_node": world_size,
        "parallel.ep_size": world_size,
        "parallel.dispatch_chunks": work.chunks,
        "experts.backend": work.backend,
        "recompute": work.recompute,
        "optimizer.lr": LEARNING_RATE,
        "optimizer.betas": list(BETAS),
        "optimizer.eps": EPS,
        "optimizer.weight_decay": DECAY,
        "optimizer.max_grad_norm": CLIP,
    }
    overrides = [
        "experiment=demo",
        f"deepspeed=zero{work.zero_stage}",
        *(f"{k}={v}" for k, v in keys.items()),
    ]
    with initialize_config_module("conf", version_base="1.3"):
        return RunConfig.load(compose("train", overrides=overrides))


def peak_gib() -> float:
    """The largest memory so far: allocated on a GPU, resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


CONTENDERS: dict[str, Callable[[Work], tuple[Callable[[], float], Any]]] = {
    "ours": ours,
    "transformers": peers.transformers,
    "autoep": peers.autoep,
    "deepspeed_moe": peers.deepspeed_moe,
}


def main(name: str, *overrides: str) -> None:
    """Train; rank 0 prints. Each loss is read on the host, so a step's time includes the device's work."""
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    os.environ.setdefault("MASTER_PORT", "29546")
    work = Work.parse(list(overrides))
    imported = peak_gib()
    step, engine = CONTENDERS[name](work)
    losses, seconds = [], []
    for _ in range(work.warm_up + work.steps):
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        losses.append(step())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    parts = {}
    if work.parts:
        time_parts(engine)
        engine.clock.lap()
        engine.clock.measuring = True
        step()
        parts = engine.clock.lap()[2]
    if os.environ["RANK"] == "0":
        result = {"name": name, **asdict(work), "losses": losses, "seconds": seconds[work.warm_up :]}
        print(
            json.dumps({**result, "parts": parts, "imported_gib": imported, "peak_gib": peak_gib()}),
            flush=True,
        )
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
