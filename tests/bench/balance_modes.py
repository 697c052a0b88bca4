"""Error and cost of the balance modes: `python tests/bench/balance_modes.py [PREPARED_DIR [HF_FOLDER]]`.

One rank, 8 micro-batches per step, each of one domain (code, prose, code, ...), as from a loader that packs
long documents. Error: the difference of the balance loss's router gradient from the exact one, relative by
norm, mean over layers and the last steps. Give HF_FOLDER, the weights of a run: the errors of an untrained
router are small. Cost: seconds per optimizer step, the median, with the modes interleaved.
"""

import os
import statistics
import sys
import time

import torch
from hydra import compose, initialize_config_module

from data_pipeline.loader import Batch, Loader
from moe.balance import Balance, balance_loss_share
from trainer.checkpoints.assemble import build_model
from trainer.engine.engine import Engine, init_deepspeed
from trainer.engine.loss import agree_on_totals, build_balance
from trainer.engine.optimizer import build_optimizer
from trainer.ranks.runtime import Ranks
from trainer.settings.config import RunConfig
from trainer.stages.supervised import Supervised
from trainer.train import train_step

MODES = ("exact", "prior_buffer", "buffer", "micro_batch")
MICRO_BATCHES, STEPS, MEASURED = 8, 10, 3


def configure(folder: str, weights: str, mode: str, recompute: str) -> RunConfig:
    overrides = [
        "name=t",
        "model=tiny_moe",
        "dtype=fp32",
        "model.router_aux_loss_coef=0.01",
        f"data.dir={folder}",
    ]
    overrides += ["stage.seq_len=256", f"stage.global_batch_size={4 * MICRO_BATCHES}", "micro_batch_size=4"]
    overrides += [f"balance.mode={mode}", f"recompute={recompute}", "deepspeed=zero1"]
    overrides += [f"stage.init_from={weights}"] if weights else []
    with initialize_config_module("conf", version_base="1.3"):
        return RunConfig.load(compose("train", overrides=overrides))


def single_domain_steps(config: RunConfig, steps: int) -> list[list[Batch]]:
    """Micro-batches that alternate between the sources."""
    loaders = [
        Loader(
            config.data,
            seq_len=config.stage.seq_len,
            global_batch_size=2 * MICRO_BATCHES,
            micro_batch_size=4,
            rank=0,
            world_size=1,
            seed=0,
            source=source,
        )
        for source in config.data.sources
    ]
    return [[batch for pair in zip(*map(next, loaders), strict=True) for batch in pair] for _ in range(steps)]


def router_gradients(
    engine: Engine, batches: list[Batch], balance: Balance, config: RunConfig
) -> torch.Tensor:
    """Gradient of the balance loss alone with respect to all routers, [L, E*H]."""
    weights = [p for name, p in engine.module.named_parameters() if name.endswith("mlp.gate.weight")]
    totals = agree_on_totals(batches, False)
    slots = totals.tokens * config.model.num_experts_per_tok
    with torch.no_grad():
        counts = [engine.forward(batch, routing_only=True).router.tokens_per_expert for batch in batches]
    if balance.counts_first:
        balance.count_first(counts)
    total = [torch.zeros_like(weight) for weight in weights]
    for batch in batches:
        router = engine.forward(batch, routing_only=True).router
        frequencies = balance.frequencies(router.tokens_per_expert, slots)
        loss = balance_loss_share(frequencies, router.probability_sums, totals.tokens).sum()
        for gradient, part in zip(total, torch.autograd.grad(loss, weights), strict=True):
            gradient += part
    balance.end_step()
    return torch.stack([gradient.flatten() for gradient in total])


def main(folder: str = "data/embedded", weights: str = "") -> None:
    """Print the table."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29544")
    ranks = Ranks.join()
    init_deepspeed(ranks.device)
    config = configure(folder, weights, "exact", "none")
    plan = config.plan(1)
    steps = single_domain_steps(config, STEPS)

    model = build_model(config, plan, ranks)
    engine = Engine(model, build_optimizer(model, config.optimizer), config, plan, ranks)
    training = build_balance(config, plan, ranks.device)
    watched = {
        mode: build_balance(configure(folder, weights, mode, "none"), plan, ranks.device) for mode in MODES
    }
    errors: dict[str, list[float]] = {mode: [] for mode in MODES}
    for number, batches in enumerate(steps):
        if number < STEPS - MEASURED - 1:  # the step before the measured ones gives the prior
            train_step(
                engine, training, Supervised.loss_shares, batches, agree_on_totals(batches, False), 1e-4
            )
            continue
        gradients = {
            mode: router_gradients(engine, batches, balance, config) for mode, balance in watched.items()
        }
        if number >= STEPS - MEASURED:
            exact = gradients["exact"]
            for mode in MODES:
                errors[mode].append(((gradients[mode] - exact).norm(dim=1) / exact.norm(dim=1)).mean().item())
        train_step(engine, training, Supervised.loss_shares, batches, agree_on_totals(batches, False), 1e-4)
    engine.close()

    seconds: dict[tuple[str, str], list[float]] = {}
    for recompute in ("none", "full"):
        runs = {}
        for mode in MODES:
            chosen = configure(folder, weights, mode, recompute)
            model = build_model(chosen, plan, ranks)
            engine = Engine(model, build_optimizer(model, chosen.optimizer), chosen, plan, ranks)
            runs[mode] = (engine, build_balance(chosen, plan, ranks.device), chosen)
        for batches in steps[:4]:
            for mode, (engine, balance, _) in runs.items():
                totals = agree_on_totals(batches, False)
                start = time.perf_counter()
                train_step(engine, balance, Supervised.loss_shares, batches, totals, 1e-4)
                seconds.setdefault((recompute, mode), []).append(time.perf_counter() - start)
        for engine, _, _ in runs.values():
            engine.close()

    print(
        "| balance.mode | gradient error | step, recompute=none | step, recompute=full |\n|---|---|---|---|"
    )
    for mode in MODES:
        cost = {}
        for recompute in ("none", "full"):
            base = statistics.median(seconds[recompute, "micro_batch"][1:])
            cost[recompute] = statistics.median(seconds[recompute, mode][1:]) / base - 1
        print(f"| {mode} | {statistics.mean(errors[mode]):.3f} | {cost['none']:+.1%} | {cost['full']:+.1%} |")
    ranks.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
