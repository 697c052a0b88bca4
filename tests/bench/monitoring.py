"""What looking costs: `python tests/bench/monitoring.py [PREPARED_DIR [STEPS]]`, on a quiet machine.

The demo's model on one rank. Steps alternate between plain ones and ones that are logged with everything on;
the cost of a logged step is the median of its time over the median of the plain ones. The share of a run is
that over the interval of logging.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from hydra import compose, initialize_config_module

from data_pipeline.loader import Loader
from trainer.config import RunConfig
from trainer.engine import Engine, init_deepspeed
from trainer.loss import agree_on_totals
from trainer.metrics import Meter
from trainer.optimizer import build_optimizer
from trainer.parallel import ParallelPlan
from trainer.runtime import Ranks
from trainer.tracker import Tracker
from trainer.train import build_balance, build_model, train_step


def main(folder: str = "data/embedded", steps: str = "40") -> None:
    """Print the cost."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29545")
    overrides = ["experiment=demo", f"data.dir={folder}", "parallel.ep_size=1", "tracker.log_every_steps=2"]
    overrides += ["parallel.nproc_per_node=1", "tracker.expert_load_every_steps=2", "tracker.wandb=offline"]
    with initialize_config_module("conf", version_base="1.3"):
        config = RunConfig.load(compose("train", overrides=overrides))
    ranks = Ranks.join()
    plan = ParallelPlan.of(config, 1)
    init_deepspeed(ranks.device)
    model = build_model(config, plan, ranks)
    optimizer = build_optimizer(model, config.optimizer)
    engine = Engine(model, optimizer, config, plan, ranks)
    balance = build_balance(config, plan, ranks.device)
    loader = Loader(
        config.data,
        seq_len=config.stage.seq_len,
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        rank=0,
        world_size=1,
        seed=0,
    )
    meter = Meter(config, plan, ranks, engine, optimizer, loader, 0)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as name, loader:
        for file in ("config.yaml", "overrides.txt", "environment.json", "git.txt"):
            (Path(name) / file).write_text("")
        with Tracker(config, Path(name), 1, print, is_main=True) as tracker:
            for step in range(1, int(steps) + 1):
                micro_batches = next(loader)
                start = time.perf_counter()
                meter.begin(step)
                totals = agree_on_totals(micro_batches, False, ranks.device)
                sums, _, grad_norm = train_step(engine, micro_batches, totals, balance, config, 1e-4)
                if meter.due:
                    tracker.log(meter.measure(step, sums, totals, grad_norm, 1e-4))
                if step > 4:
                    seconds[meter.due].append(time.perf_counter() - start)
    plain, logged = (statistics.median(seconds[due]) for due in (False, True))
    cost = logged - plain
    print(f"plain step {plain:.4f} s, logged step {logged:.4f} s: {cost / plain:+.2%} of a logged step,")
    print(f"{cost / plain / 10:+.3%} of a run that logs every 10 steps, {cost / plain / 5:+.3%} every 5")
    engine.close()
    ranks.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
