"""The run, from top to bottom."""

import math
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loader import Batch
from moe.balance import Balance
from moe.config import ConfigError
from moe.dispatch import AllToAllDispatcher, DeduplicatedAllToAllDispatcher
from moe.hf import load_hf
from moe.init import init_weights, upcycle_weights
from moe.model import CausalLM, ModelOutput
from moe.parallelize import apply_expert_parallel
from trainer.checkpoints.folder import reading
from trainer.checkpoints.saving import Checkpoints, check_tokenizer
from trainer.engine.backends import Backends, choose_backends
from trainer.engine.cpu_products import fast_products
from trainer.engine.engine import Engine, all_to_all, expert_parallel_group, init_deepspeed, mark_experts
from trainer.engine.loss import Totals, agree_on_totals, loss_shares
from trainer.engine.optimizer import build_optimizer, learning_rate
from trainer.evaluate import evaluate, open_loader
from trainer.monitor.alarms import Alarm, Alarms, first_not_finite
from trainer.monitor.metrics import Meter, StepSums
from trainer.monitor.terminal import Terminal, closing
from trainer.monitor.tracker import Tracker
from trainer.ranks.device import device_facts, device_name, use_deterministic_algorithms
from trainer.ranks.launch import StopRequest
from trainer.ranks.runtime import DTYPES, Ranks, TrainingError, garbage_collected_by_hand, seed_everything
from trainer.settings.config import RunConfig
from trainer.settings.parallel import ParallelPlan
from trainer.settings.run_folder import hf_folder, record_attempt

DISPATCHERS = {"all_to_all": AllToAllDispatcher, "deduplicated": DeduplicatedAllToAllDispatcher}

KEPT = 4  # forwards that wait for the counts of a step: each holds its layers' inputs and the head's gradient


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

    `cleanup` closes what is open however training ends. Raises TrainingError when the loss is no number any
    more, or a checkpoint cannot be written; the last good checkpoint stays.
    """
    plan = ParallelPlan.of(config, ranks.world_size)
    seed_everything(config.seed, ranks.rank)
    total_steps, step_tokens = config.stage.total_steps, config.stage.step_tokens
    screen = Terminal(terminal if ranks.is_main else None, total_steps)
    cleanup.callback(screen.close)

    backends = prepare_device(config, run_dir, attempt, ranks, screen)
    init_deepspeed(ranks.device)
    cleanup.enter_context(fast_products(ranks.device, DTYPES[config.dtype]))
    hosts = check_hosts(config, plan, screen)
    model = build_model(config, plan, ranks)
    optimizer = build_optimizer(model, config.optimizer)
    engine = Engine(model, optimizer, config, plan, ranks)
    balance = build_balance(config, plan, ranks.device)
    checkpoints = Checkpoints(run_dir, attempt, config, plan, ranks, screen.say)
    cleanup.callback(checkpoints.close)
    step = checkpoints.load_latest(engine, balance)
    loader = open_loader(config, ranks, next_row=step * plan.global_batch_size)
    cleanup.callback(loader.close)
    loader.check_budget(total_steps * plan.global_batch_size)
    tracker = cleanup.enter_context(Tracker(config, run_dir, attempt, screen.say, ranks.is_main))
    alarms = Alarms(config.tracker.alarms, hosts)
    meter, clock = Meter(config, ranks, engine, optimizer, step), engine.clock
    screen.say("\n  ".join([describe(config, plan, ranks.device, backends, step), *loader.describe()]))

    cleanup.enter_context(garbage_collected_by_hand())  # where a checkpoint is saved
    metrics: dict = {}
    saved_step, outcome = step, "finished"
    while step < total_steps:
        with clock.wait("data"):
            micro_batches = next(loader)
        meter.begin(step + 1)
        with clock.part("communication"):
            totals = agree_on_totals(micro_batches, stop.requested, checkpoints.written)
        with clock.wait("save"):
            if totals.written:
                checkpoints.finish()
        if totals.stop:
            outcome = "stopped"
            break

        micro_batches = [batch.to(ranks.device) for batch in micro_batches]
        rate = learning_rate(config.schedule, config.optimizer.lr, step, total_steps)
        sums, losses, grad_norm = train_step(engine, micro_batches, totals, balance, config, rate)
        if not math.isfinite(grad_norm):  # the same on every rank: the norm is global
            checkpoints.finish()
            with first_not_finite(engine.module) as first:
                train_step(engine, micro_batches, totals, balance, config, rate)  # again: it moved nothing
            message = diverged(step + 1, micro_batches, losses, first, ranks, run_dir)
            tracker.alert(step + 1, Alarm("not finite", message))
            raise TrainingError(message)
        step += 1

        if meter.due:
            metrics = meter.measure(step, sums, totals, grad_norm, rate, checkpoints.take_stall())
            tracker.log(metrics | {"sources": loader.seen()})
            screen.progress(metrics, saved_step)
            for alarm in alarms.check(metrics):
                tracker.alert(step, alarm)
        every = config.evaluate.every_steps
        if every and (step % every == 0 or step == total_steps):
            with clock.wait("evaluation"):
                held_out = held_out_losses(engine, balance, config, ranks)
            perplexity = {f"perplexity{key[4:]}": math.exp(min(loss, 700)) for key, loss in held_out.items()}
            tracker.log({"step": step, "tokens": step * step_tokens, **held_out, **perplexity})
            screen.say(f"step {step}: " + ", ".join(f"{key} {value:.3f}" for key, value in held_out.items()))
            metrics |= held_out
        if step % config.checkpoint.every_steps == 0:
            with clock.wait("save"):
                checkpoints.save(engine, balance, step)
            saved_step = step

    checkpoints.save(engine, balance, step)
    checkpoints.finish()
    if stall := checkpoints.take_stall():  # of saves after the last logged step
        tracker.log({"step": step, "tokens": step * step_tokens, "save_stall_seconds": stall})
    if outcome == "stopped":
        screen.say(f"stopped at step {step} of {total_steps}; go on with: python -m trainer.resume {run_dir}")
    elif metrics:
        screen.say(closing(config, metrics, loader.manifest, run_dir))
    else:
        screen.say("nothing to do: the run is finished")
    engine.close()
    return outcome


def train_step(
    engine: Engine, batches: list[Batch], totals: Totals, balance: Balance, config: RunConfig, rate: float
) -> tuple[StepSums, list[Tensor], float]:
    """One optimizer step: this rank's sums, its losses per micro-batch, and the global gradient norm."""
    model, bias = config.model, balance.bias
    kept: list[ModelOutput] = []
    if balance.counts_first:
        # Full recompute keeps little of a forward: a few wait for the counts. ZeRO-3 would lose gradients.
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
        shares = loss_shares(output, frequencies, totals)
        loss = shares.total(config)
        engine.backward(loss)
        sums.add(shares, output.router)
        losses.append(loss.detach())
    balance.end_step()
    return sums, losses, engine.step(rate)


def held_out_losses(engine: Engine, balance: Balance, config: RunConfig, ranks: Ranks) -> dict[str, float]:
    """`evaluate` of the model in evaluation mode, which it leaves afterwards. Every rank must call it."""
    engine.module.eval()
    losses = evaluate(lambda batch: engine.forward(batch, balance.bias), config, ranks)
    engine.module.train()
    return losses


def prepare_device(
    config: RunConfig, run_dir: Path, attempt: int, ranks: Ranks, screen: Terminal
) -> Backends:
    """Set this rank's device up, say what is slow on it, and record what the attempt computes on."""
    if config.deterministic:
        use_deterministic_algorithms()
    backends = backends_of(config, ranks)
    for warning in filter(None, (ranks.warning, *backends.warnings)):
        screen.say(f"warning: {warning}")
    if ranks.is_main:
        record_attempt(run_dir, attempt, {**device_facts(ranks.device), "backends": backends.names})
    return backends


def build_balance(config: RunConfig, plan: ParallelPlan, device: torch.device) -> Balance:
    """The expert frequencies and the selection bias of a run."""
    return Balance(
        config.balance.mode,
        num_layers=config.model.num_moe_layers,
        num_experts=config.model.num_experts,
        micro_batches_per_step=plan.gradient_accumulation_steps,
        bias_update_rate=config.balance.bias_update_rate,
        device=device,
    )


def build_model(config: RunConfig, plan: ParallelPlan, ranks: Ranks) -> CausalLM:
    """The model with this rank's experts only, weights read from `stage.init_from` or drawn from the seed."""
    backend = backends_of(config, ranks).names.get("experts", "loop")
    ep_rank, upcycles = plan.ep_rank(ranks.rank), config.init.upcycle != "none"
    with torch.device("meta"):
        model = CausalLM(config.model, backend=backend, recompute=config.recompute)
    if plan.ep_size > 1:
        kind, chunks = DISPATCHERS[config.parallel.dispatcher], config.parallel.dispatch_chunks
        dispatcher = kind(expert_parallel_group(plan.ep_size), all_to_all, chunks)
        apply_expert_parallel(model, ep_rank=ep_rank, ep_size=plan.ep_size, dispatcher=dispatcher)
    if not upcycles:  # whose arithmetic wants fp32
        model.to(DTYPES[config.dtype])
    model.to_empty(device=ranks.device)
    if config.stage.init_from is None:
        init_weights(model, config.seed, ep_rank=ep_rank, router_scale=config.init.router_scale)
    else:
        found = [hf_folder(Path(config.stage.init_from))]
        dist.broadcast_object_list(found)  # one for all ranks, also of a run that goes on meanwhile
        (weights,) = found
        check_tokenizer(weights, config.data)
        with reading(weights):
            if not upcycles:
                load_hf(model, weights, ep_rank=ep_rank)
            else:
                noise, scale = config.init.upcycle_noise, config.init.router_scale
                upcycle_weights(
                    model, weights, seed=config.seed, noise=noise, ep_rank=ep_rank, router_scale=scale
                )
                model.to(DTYPES[config.dtype])
    # Last: a parameter that is made anew loses its marks.
    mark_experts(model, config.model.num_experts, plan.ep_size, ep_rank)
    return model


def backends_of(config: RunConfig, ranks: Ranks) -> Backends:
    """What computes the layers on the device of this rank."""
    dtype = DTYPES[config.dtype]
    return choose_backends(config.model, config.experts.backend, ranks.device, dtype, config.deterministic)


def check_hosts(config: RunConfig, plan: ParallelPlan, screen: Terminal) -> list[str]:
    """The host of each rank. Say which expert-parallel groups span nodes, where all tokens cross the network.

    Raises ConfigError instead under `parallel.ep_within_node`. Every rank must call it.
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


def describe(
    config: RunConfig, plan: ParallelPlan, device: torch.device, backends: Backends, step: int
) -> str:
    """What is about to be trained, and on what, in one line."""
    total, active = config.model.num_parameters(), config.model.num_active_parameters()
    devices = f"{plan.world_size} " if device.type == "cuda" else ""
    return (
        f"{config.name}: {total / 1e6:,.1f}M parameters ({active / 1e6:,.1f}M active) "
        f"on {devices}{device_name(device)} ({', '.join(map(' '.join, backends.names.items()))}), "
        f"{plan.world_size} ranks, ep_size {plan.ep_size}, ZeRO {config.zero_stage}, "
        f"{plan.gradient_accumulation_steps} micro-batches per step, "
        f"{config.stage.step_tokens:,} tokens per step, {config.stage.total_steps:,} steps"
        + (f", going on after step {step}" if step else "")
    )


def diverged(
    step: int, micro_batches: list[Batch], losses: list[Tensor], first: list[str], ranks: Ranks, run_dir: Path
) -> str:
    """Which rank and rows made the loss of a step no number; every rank must call it."""
    rows = [batch.rows for batch, loss in zip(micro_batches, losses, strict=True) if not torch.isfinite(loss)]
    here = [*(f"rows {list(row)}" for row in rows), *(f"first {what}" for what in first)]
    everywhere: list = [None] * ranks.world_size
    dist.all_gather_object(everywhere, here)
    where = "; ".join(f"rank {rank}, {what}" for rank, found in enumerate(everywhere) for what in found)
    return (
        f"the gradient is not finite at step {step} ({where}); the last checkpoint is unharmed. "
        f"Look at these rows, or start a run with a lower optimizer.lr from its weights: "
        f"stage.init_from={run_dir}/checkpoints/.../hf"
    )
