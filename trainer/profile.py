"""`python -m trainer.profile RUN_DIR [--steps N]`: measure the cost of steps from the newest checkpoint.

Writes into RUN_DIR/profile: rank-R.json, a trace for Perfetto (https://ui.perfetto.dev), and rank-R.txt, the
ten largest costs and DeepSpeed's log of the communication of one step. The rest of the run folder is not
changed. Under srun or torchrun, which set RANK, this is one rank; otherwise it starts all ranks here.
"""

import argparse
import os
import signal
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

from trainer.ranks.launch import STOP_SIGNALS, exit_with, launch
from trainer.settings.command import tells_mistakes
from trainer.settings.config import RunConfig
from trainer.settings.run_folder import lock

_WARM_UP = 2  # steps before the measured ones


def profile_rank(run_dir: Path, steps: int) -> None:
    """One rank's part: the steps under torch's profiler, then one more step under the communication log."""
    import torch

    from trainer.ranks.device import use_deterministic_algorithms
    from trainer.ranks.runtime import DTYPES, Ranks, redirect_output, seed_everything

    config = RunConfig.of_run(run_dir)
    ranks = Ranks.join(config.device)  # before DeepSpeed looks for devices

    from trainer.checkpoints.assemble import build_model
    from trainer.checkpoints.saving import Checkpoints
    from trainer.engine.cpu_products import fast_products
    from trainer.engine.engine import Engine, communication_log, init_deepspeed
    from trainer.engine.loss import agree_on_totals, build_balance
    from trainer.engine.optimizer import build_optimizer
    from trainer.stages.kinds import open_stage
    from trainer.train import train_step

    plan, folder = config.plan(ranks.world_size), run_dir / "profile"
    redirect_output(folder / f"rank-{ranks.rank}.log")
    seed_everything(config.seed, ranks.rank)
    if config.deterministic:
        use_deterministic_algorithms()
    init_deepspeed(ranks.device)
    model = build_model(config, plan, ranks)
    engine = Engine(model, build_optimizer(model, config.optimizer), config, plan, ranks)
    balance = build_balance(config, plan, ranks.device)
    done = Checkpoints(run_dir, 0, config, plan, ranks, print).load_latest(engine, balance)
    stage = open_stage(config, ranks, engine, balance, *done, partial(build_model, plan=plan, ranks=ranks))

    def step() -> None:
        micro_batches = [batch.to(ranks.device) for batch in stage.micro_batches()]
        totals = agree_on_totals(micro_batches, False)
        train_step(engine, balance, stage.loss_shares, micro_batches, totals, rate=0.0)

    schedule = torch.profiler.schedule(wait=0, warmup=_WARM_UP, active=steps, repeat=1)
    products = fast_products(ranks.device, DTYPES[config.dtype])
    with closing(stage), products, torch.profiler.profile(schedule=schedule, acc_events=True) as profiler:
        for _ in range(_WARM_UP + steps):
            step()
            profiler.step()
        profiler.stop()
        traffic = communication_log(step)
    profiler.export_chrome_trace(str(folder / f"rank-{ranks.rank}.json"))
    order = f"self_{ranks.device.type}_time_total"
    costs = profiler.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=50)
    (folder / f"rank-{ranks.rank}.txt").write_text(f"{steps} steps\n{costs}\n{traffic}\n")
    engine.close()
    ranks.leave()


@tells_mistakes
def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.profile", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=3, help="number of measured steps")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be above 0")
    run_dir, folder = options.run_dir, options.run_dir / "profile"
    if "RANK" in os.environ:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # end at once: nothing to save
        profile_rank(run_dir, options.steps)
        return 0
    config = RunConfig.of_run(run_dir)
    config.check()
    folder.mkdir(exist_ok=True)
    command = ["trainer.profile", f"--steps={options.steps}", "--", str(run_dir)]
    code = launch(command, config.parallel.nproc_per_node, config.device, lock(run_dir))
    print(f"failed: see {folder}/rank-*.log" if code else (folder / "rank-0.txt").read_text())
    return code


if __name__ == "__main__":
    exit_with(main(sys.argv[1:]))
