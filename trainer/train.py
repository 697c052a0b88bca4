"""Training on one rank, from start to end."""

import math
import socket
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loader import Batch
from moe.balance import Balance
from moe.config import ConfigError
from moe.model import ModelOutput
from trainer.checkpoints.assemble import build_model
from trainer.checkpoints.saving import Checkpoints
from trainer.engine.backends import Backends, backends_of
from trainer.engine.cpu_products import fast_products
from trainer.engine.engine import Engine, init_deepspeed
from trainer.engine.loss import LossFunction, Totals, agree_on_totals, build_balance
from trainer.engine.optimizer import build_optimizer, learning_rate
from trainer.monitor.alarms import Alarm, Alarms, diverged, first_not_finite
from trainer.monitor.metrics import Meter, StepSums
from trainer.monitor.terminal import Terminal, closing, opening
from trainer.monitor.tracker import Tracker
from trainer.ranks.device import device_facts, use_deterministic_algorithms
from trainer.ranks.launch import StopRequest
from trainer.ranks.runtime import DTYPES, Ranks, TrainingError, garbage_collected_by_hand, seed_everything
from trainer.settings.config import RunConfig
from trainer.settings.parallel import ParallelPlan
from trainer.settings.run_folder import pasted, record_attempt
from trainer.stages.evaluation import evaluate, open_benchmarks
from trainer.stages.kinds import open_stage

# At most so many forwards are kept until the routing of a step is counted. Each keeps the inputs of its
# layers and the gradient of the head.
KEPT = 4


def train(
    config: RunConfig,
    run_dir: Path,
    attempt: int,
    ranks: Ranks,
    stop: StopRequest,
    terminal: TextIO,
    cleanup: ExitStack,
) -> str:
    """Train until the token budget or a stop request; returns "finished" or "stopped".

    `cleanup` closes all that is open, also after an error. Raises TrainingError when the gradient norm is no
    longer finite, or a checkpoint cannot be written; the last good checkpoint stays.
    """
    plan = config.plan(ranks.world_size)
    seed_everything(config.seed, ranks.rank)
    total_steps, step_tokens = config.stage.total_steps, config.stage.step_tokens
    screen = Terminal(terminal if ranks.is_main else None, total_steps)
    cleanup.callback(screen.close)

    backends = prepare_device(config, run_dir, attempt, ranks, screen)
    init_deepspeed(ranks.device)
    cleanup.enter_context(fast_products(ranks.device, DTYPES[config.dtype]))
    hosts = check_hosts(config, plan, screen)
    benchmarks = open_benchmarks(config, ranks, screen.say)
    build = partial(build_model, plan=plan, ranks=ranks)
    model = build(config)
    optimizer = build_optimizer(model, config.optimizer)
    engine = Engine(model, optimizer, config, plan, ranks)
    balance = build_balance(config, plan, ranks.device)
    checkpoints = Checkpoints(run_dir, attempt, config, plan, ranks, screen.say)
    cleanup.callback(checkpoints.close)
    step, state = checkpoints.load_latest(engine, balance)
    stage = open_stage(config, ranks, engine, balance, step, state, build)
    cleanup.callback(stage.close)
    tracker = cleanup.enter_context(Tracker(config, run_dir, attempt, screen.say, ranks.is_main))
    alarms = Alarms(config.tracker.alarms, hosts, config.schedule.warmup_steps)
    meter, clock = Meter(config, ranks, engine, optimizer, step), engine.clock
    screen.say("\n  ".join([opening(config, plan, ranks.device, backends, step), *stage.describe()]))

    cleanup.enter_context(garbage_collected_by_hand())  # collected in Checkpoints.save
    metrics: dict = {}
    saved_step, outcome = step, "finished"
    while step < total_steps:
        with clock.wait("data"):
            micro_batches = stage.micro_batches()
        meter.begin(step + 1)
        with clock.part("communication"):
            totals = agree_on_totals(micro_batches, stop.requested, checkpoints.written)
        with clock.wait("save"):
            if totals.written:
                checkpoints.finish()
        if totals.stop:
            outcome = "stopped"
            break
        meter.add(totals)

        micro_batches = [batch.to(ranks.device) for batch in micro_batches]
        rate = learning_rate(config.schedule, config.optimizer.lr, step, total_steps)
        sums, losses, grad_norm = train_step(engine, balance, stage.loss_shares, micro_batches, totals, rate)
        if not math.isfinite(grad_norm):  # true on all ranks or none: the norm is global
            checkpoints.finish()
            with first_not_finite(engine.module) as first:  # repeat the step, which changed no weight
                train_step(engine, balance, stage.loss_shares, micro_batches, totals, rate)
            message = diverged(step + 1, micro_batches, losses, first, ranks, run_dir)
            tracker.alert(step + 1, Alarm("not finite", message))
            raise TrainingError(message)
        step += 1

        if meter.due:
            metrics = meter.measure(step, sums, totals, grad_norm, rate, checkpoints.take_stall())
            metrics |= stage.metrics()
            tracker.log(metrics)
            screen.progress(metrics, saved_step)
            for alarm in alarms.check(metrics):
                tracker.alert(step, alarm)
        with clock.wait("evaluation"):
            measured = evaluate(run_dir, stage, benchmarks, engine, balance, step, step == total_steps)
        if measured:
            tracker.log({"step": step, "tokens": step * step_tokens, **measured})
            screen.evaluated(step, measured)
            metrics |= measured
        if step % config.checkpoint.every_steps == 0:
            with clock.wait("save"):
                checkpoints.save(engine, balance, step, stage.state(step))
            saved_step = step

    checkpoints.save(engine, balance, step, stage.state(step))
    checkpoints.finish()
    if stall := checkpoints.take_stall():  # from saves after the last logged step
        tracker.log({"step": step, "tokens": step * step_tokens, "save_stall_seconds": stall})
    if outcome == "stopped":
        again = f"resume: python -m trainer.resume {pasted(run_dir)}"
        screen.say(f"stopped at step {step} of {total_steps}; {again}")
    elif metrics:
        screen.say(closing(config, metrics, stage.results(metrics), run_dir))
    else:
        screen.say("nothing to do: the run is finished")
    engine.close()
    return outcome


def train_step(
    engine: Engine,
    balance: Balance,
    loss_shares: LossFunction,
    batches: list[Batch],
    totals: Totals,
    rate: float,
) -> tuple[StepSums, list[Tensor], float]:
    """One optimizer step; returns this rank's sums, loss per micro-batch, and the global gradient norm."""
    config, bias = engine.config, balance.bias
    model = config.model
    kept: list[ModelOutput] = []
    if balance.counts_first:
        # With full recompute a forward needs little memory: keep a few of them. ZeRO-3 would lose gradients.
        if config.recompute == "full" and config.zero_stage < 3 and len(batches) <= KEPT:
            kept = counted = [engine.forward(batch, bias) for batch in batches]
        else:
            with torch.no_grad():
                counted = [engine.forward(batch, bias, routing_only=True) for batch in batches]
        routed = [output.router.tokens_per_expert for output in counted if output.router is not None]
        with engine.clock.part("communication"):
            balance.count_first(routed)
    sums = StepSums.zeros(model.num_moe_layers, model.num_experts, batches[0].labels.device)
    losses = []
    for batch in batches:
        output = kept.pop(0) if kept else engine.forward(batch, bias)
        frequencies = None
        if output.router is not None:
            slots = totals.tokens * model.num_experts_per_tok
            with engine.clock.part("communication"):
                frequencies = balance.frequencies(output.router.tokens_per_expert, slots)
        shares = loss_shares(batch, output, frequencies, totals)
        loss = shares.total(config)
        engine.backward(loss)
        sums.add(shares, output.router)
        losses.append(loss.detach())
    balance.end_step()
    return sums, losses, engine.step(rate)


def prepare_device(
    config: RunConfig, run_dir: Path, attempt: int, ranks: Ranks, screen: Terminal
) -> Backends:
    """Set up this rank's device; warn about slow devices and backends; record both for the attempt."""
    if config.deterministic:
        use_deterministic_algorithms()
    backends = backends_of(config, ranks)
    for warning in filter(None, (ranks.warning, *backends.warnings)):
        screen.say(f"warning: {warning}")
    if ranks.is_main:
        record_attempt(run_dir, attempt, {**device_facts(ranks.device), "backends": backends.names})
    return backends


def check_hosts(config: RunConfig, plan: ParallelPlan, screen: Terminal) -> list[str]:
    """The host of each rank. Warns about expert-parallel groups that span nodes: tokens cross the network.

    With `parallel.ep_within_node` raises ConfigError instead. Every rank must call it.
    """
    hosts: list = [None] * plan.world_size
    dist.all_gather_object(hosts, socket.gethostname())
    apart = plan.groups_across_nodes(hosts)
    if apart and config.parallel.ep_within_node:
        remedy = "use at most the ranks of a node, or parallel.ep_within_node=false"
        raise ConfigError([f"parallel.ep_size={plan.ep_size} spans nodes ({'; '.join(apart)}); {remedy}"])
    if apart:
        screen.say(f"warning: expert-parallel groups span nodes, which is slow: {'; '.join(apart)}")
    return hosts
