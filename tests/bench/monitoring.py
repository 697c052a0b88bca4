"""Cost of monitoring: `python tests/bench/monitoring.py [PREPARED_DIR [STEPS]]`, on an idle machine.

The demo's model on one rank; every second step is logged with everything on. The cost of a logged step is the
summed time of what only logged steps do (norms as the optimizer steps, the all-reduce, the files, W&B): the
difference of whole steps is smaller than their noise.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module

from trainer.checkpoints.assemble import build_model
from trainer.engine.engine import Engine, init_deepspeed
from trainer.engine.loss import agree_on_totals, build_balance
from trainer.engine.optimizer import build_optimizer
from trainer.monitor.metrics import Meter, OptimizerNorms
from trainer.monitor.tracker import Tracker
from trainer.ranks.runtime import Ranks
from trainer.settings.config import RunConfig
from trainer.stages.held_out import open_loader
from trainer.stages.supervised import Supervised
from trainer.train import train_step


def main(folder: str = "data/embedded", steps: str = "40") -> None:
    """Print the cost."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29545")
    overrides = ["experiment=demo", f"data.dir={folder}", "parallel.ep_size=1", "tracker.log_every_steps=2"]
    overrides += ["parallel.nproc_per_node=1", "tracker.expert_load_every_steps=2", "tracker.wandb=offline"]
    overrides += ["stage.global_batch_size=16", "micro_batch_size=8"]
    with initialize_config_module("conf", version_base="1.3"):
        config = RunConfig.load(compose("train", overrides=overrides))
    ranks = Ranks.join()
    plan = config.plan(1)
    init_deepspeed(ranks.device)
    model = build_model(config, plan, ranks)
    optimizer = build_optimizer(model, config.optimizer)
    engine = Engine(model, optimizer, config, plan, ranks)
    balance = build_balance(config, plan, ranks.device)
    loader = open_loader(config, ranks)
    looking: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            looking[-1] += time.perf_counter() - start
            return result

        return call

    watched = [(OptimizerNorms, "_before"), (OptimizerNorms, "_after"), (Meter, "measure"), (Tracker, "log")]
    for owner, name in watched:
        setattr(owner, name, timed(getattr(owner, name)))
    meter = Meter(config, ranks, engine, optimizer, 0)
    plain: list[float] = []
    with tempfile.TemporaryDirectory() as name, loader:
        for file in ("config.yaml", "overrides.txt", "environment.json", "git.txt"):
            (Path(name) / file).write_text("")
        with Tracker(config, Path(name), 1, print, is_main=True) as tracker:
            for step in range(1, int(steps) + 1):
                micro_batches = next(loader)
                start = time.perf_counter()
                looking.append(0.0)
                meter.begin(step)
                totals = agree_on_totals(micro_batches, False)
                meter.add(totals)
                sums, _, grad_norm = train_step(
                    engine, balance, Supervised.loss_shares, micro_batches, totals, 1e-4
                )
                if meter.due:
                    tracker.log(meter.measure(step, sums, totals, grad_norm, 1e-4, 0.0))
                if not meter.due:
                    plain.append(time.perf_counter() - start)
    step_seconds, cost = statistics.median(plain), statistics.median(looking[5::2])
    print(f"step {step_seconds:.4f} s, monitoring of a logged one {cost:.4f} s: {cost / step_seconds:.2%},")
    print(f"{cost / step_seconds / 10:.3%} of a run that logs every 10 steps")
    engine.close()
    ranks.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
