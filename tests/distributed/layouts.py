"""Trains a small model for a few steps under any layout of ranks; gathers losses, norms and parameters."""

from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from torch import Tensor

from data_pipeline.loader import Batch
from data_pipeline.packing import Row, pack_rows
from moe.init import init_weights
from moe.model import CausalLM
from trainer.checkpoints.assemble import build_model
from trainer.engine.engine import Engine, init_deepspeed
from trainer.engine.loss import agree_on_totals, build_balance
from trainer.engine.optimizer import build_optimizer
from trainer.ranks.runtime import Ranks
from trainer.settings.config import RunConfig
from trainer.settings.parallel import ParallelPlan
from trainer.stages.held_out import open_loader
from trainer.stages.supervised import Supervised
from trainer.train import train_step

ROWS, SEQ_LEN, VOCAB, STEPS, RATE = 16, 32, 64, 3, 1e-2
END_OF_TEXT = 0
SMALL = [
    "name=t",
    "dtype=fp32",
    f"model.vocab_size={VOCAB}",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "model.head_dim=16",
    "model.num_experts=8",
    "model.num_experts_per_tok=2",
    "model.moe_intermediate_size=16",
    "model.router_aux_loss_coef=0.1",
    "balance.z_loss_coef=0.01",
    "mtp_loss_scaling_factor=0.3",
    "optimizer.max_grad_norm=0.5",
    "optimizer.eps=1e-4",  # 1e-8 would magnify the rounding of gradients near zero under every layout
    f"stage.seq_len={SEQ_LEN}",
    f"stage.global_batch_size={ROWS}",
]

# overrides that turn these settings into a small model of each architecture
MTP = "model.num_nextn_predict_layers=1"
DENSE = ["model.num_experts=0", "model.router_aux_loss_coef=0", "balance.z_loss_coef=0"]
_SHARED = "model.shared_expert_intermediate_size=24"
FAMILY = {
    "qwen2": ["model=tiny_qwen2", *DENSE],
    "qwen3": ["model=tiny_dense", *DENSE],
    "qwen2_moe": ["model=tiny_qwen2_moe", _SHARED],
    "qwen3_moe": ["model=tiny_moe", "model.num_hidden_layers=3", "model.mlp_only_layers=[1]"],
    "shared_without_gate": ["model=tiny_moe", _SHARED, "model.decoder_sparse_step=2"],
    "qwen3_next": [
        "model=tiny_qwen3_next",
        "model.layer_types=[linear_attention,full_attention]",
        "model.linear_key_head_dim=8",
        "model.linear_value_head_dim=12",
        _SHARED,
    ],
}

# {"losses": [...], "balance_losses": [...], "grad_norms": [...], "parameters": {name: whole tensor}}
Outcome = dict[str, Any]


def small_config(*overrides: str) -> RunConfig:
    """The configuration with these overrides; the model is tiny_moe unless an override names another."""
    model = [] if any(one.startswith("model=") for one in overrides) else ["model=tiny_moe"]
    with initialize_config_module("conf", version_base="1.3"):
        return RunConfig.load(compose("train", overrides=[*model, *SMALL, *overrides]))


def make_rows(step: int) -> list[Row]:
    """The rows of one step: documents of different lengths and some short rows, like packed real text."""
    generator = torch.Generator().manual_seed(100 + step)
    rows = []
    for row in range(ROWS):
        tokens = torch.randint(1, VOCAB, (SEQ_LEN + 1,), generator=generator)
        tokens[torch.randint(3, SEQ_LEN, (row % 4,), generator=generator)] = END_OF_TEXT
        kept = tokens[: SEQ_LEN - row if row % 5 == 2 else None].numpy()
        starts = np.concatenate([[0], np.flatnonzero(kept[:-1] == END_OF_TEXT) + 1])
        rows.append(Row(kept.astype(np.uint32), starts, np.ones(len(kept), dtype=bool)))
    return rows


def micro_batches(plan: ParallelPlan, rank: int, step: int) -> list[Batch]:
    """This rank's micro-batches of a step, with some labels masked."""
    rows, batches = make_rows(step), []
    for m in range(plan.gradient_accumulation_steps):
        first = (m * plan.world_size + rank) * plan.micro_batch_size
        numbers = tuple(range(first, first + plan.micro_batch_size))
        chosen = [rows[number] for number in numbers]
        packed = pack_rows(chosen, SEQ_LEN, END_OF_TEXT, predict_first_token=False)
        input_ids, labels, *rest = map(torch.from_numpy, packed)
        for slot, number in enumerate(numbers):
            if number % 7 == 1:
                labels[slot, 5:25] = -100
        batches.append(Batch.of(input_ids, labels, *rest, rows=numbers))
    return batches


class SmallRun:
    """The small model on the ranks of the process group, configured by the overrides."""

    def __init__(self, *overrides: str, device: str = "cpu") -> None:
        place = torch.device(device)
        init_deepspeed(place)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self.ranks = Ranks(rank, rank, world_size, place)
        self.config = small_config(*overrides)
        self.plan = self.config.plan(world_size)
        self.config.check(world_size)
        model = build_model(self.config, self.plan, self.ranks)
        optimizer = build_optimizer(model, self.config.optimizer)
        self.engine = Engine(model, optimizer, self.config, self.plan, self.ranks)
        self.balance = build_balance(self.config, self.plan, self.ranks.device)

    def train(self, steps: range, same_rows: bool = False, rate: float = RATE) -> Outcome:
        """Train for these steps, on new rows in each step, or with `same_rows` always on those of step 0."""
        outcome: Outcome = {"losses": [], "balance_losses": [], "grad_norms": [], "mtp_losses": []}
        for step in steps:
            batches = micro_batches(self.plan, self.ranks.rank, 0 if same_rows else step)
            totals = agree_on_totals(batches, False)
            batches = [batch.to(self.ranks.device) for batch in batches]
            sums, _, grad_norm = train_step(
                self.engine, self.balance, Supervised.loss_shares, batches, totals, rate
            )
            metrics = sums.over_ranks().describe(totals)
            outcome["losses"].append(metrics["loss"])
            outcome["balance_losses"].append(metrics.get("balance_loss", 1.0))
            outcome["grad_norms"].append(grad_norm)
            outcome["mtp_losses"] += [metrics["mtp_loss"]] if "mtp_loss" in metrics else []
        return outcome | {"parameters": gather_parameters(self.engine, self.plan, self.ranks)}


def train_small(*overrides: str, steps: int = STEPS, same_rows: bool = False, device: str = "cpu") -> Outcome:
    """Train a `SmallRun` with these overrides for `steps` steps and close its engine."""
    run = SmallRun(*overrides, device=device)
    outcome = run.train(range(steps), same_rows)
    run.engine.close()
    return outcome


def oracle_model(config: RunConfig) -> CausalLM:
    """The whole model in fp64 with the reference expert loop and the same initial values."""
    with torch.device("meta"):
        model = CausalLM(config.model, backend="reference")
    model.to_empty(device="cpu")
    init_weights(model, config.seed)
    return model.double()


def oracle_optimizer(model: CausalLM, config: RunConfig) -> torch.optim.AdamW:
    """torch's AdamW over two groups, with and without weight decay."""
    centred = ("q_norm.weight", "k_norm.weight") if config.model.zero_centered_norm else ()
    decayed = {
        name
        for name, p in model.named_parameters()
        if name.endswith(centred) or (p.ndim > 1 and "embed" not in name)
    }
    matrices = [p for name, p in model.named_parameters() if name in decayed]
    others = [p for name, p in model.named_parameters() if name not in decayed]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.optimizer.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=RATE,
        betas=(0.9, 0.95),
        eps=config.optimizer.eps,
    )


def slow_held_out(config: RunConfig, model: CausalLM, bias: Tensor) -> dict[str, float]:
    """The held-out losses of a run in one process, a row at a time, from the logits."""
    ranks, sums, found = Ranks(0, 0, 1, torch.device("cpu")), torch.zeros(2, dtype=torch.float64), {}
    for source in config.data.sources:
        total = torch.zeros(2, dtype=torch.float64)
        rows = {"global_batch_size": 1, "micro_batch_size": 1, "split": "validation", "source": source}
        with open_loader(config, ranks, **rows) as loader, torch.no_grad():
            for (batch,) in islice(loader, config.evaluate.rows):
                place = (batch.input_ids, batch.position_ids, batch.cu_seqlens)
                logits = model(*place, selection_bias=bias).logits[0]
                loss = F.cross_entropy(logits, batch.labels[0], reduction="sum")
                total += torch.stack([loss, (batch.labels != -100).sum()])
        found[f"loss/{source}"] = float(total[0] / total[1])
        sums += total
    return found | {"loss/validation": float(sums[0] / sums[1])}


def train_oracle(*overrides: str) -> Outcome:
    """The same three steps in a simple way: one process, fp64, all rows at once, autograd, torch's AdamW."""
    config = small_config(f"micro_batch_size={ROWS}", "experts.backend=reference", *overrides)
    model = oracle_model(config)
    optimizer = oracle_optimizer(model, config)
    outcome: Outcome = {"losses": [], "balance_losses": [], "grad_norms": [], "mtp_losses": []}
    for step in range(STEPS):
        ahead = torch.zeros(())
        (batch,) = micro_batches(config.plan(1), 0, step)
        output = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.token_mask)
        cross_entropy = F.cross_entropy(output.logits.flatten(0, 1), batch.labels.flatten())
        balance, z = torch.ones(1), torch.zeros(1)  # the values for a dense model
        if output.router is not None:
            counts, probabilities = (
                output.router.tokens_per_expert.double(),
                output.router.probability_sums.double(),
            )
            tokens, experts, top_k = batch.token_mask.sum(), 8, 2
            balance = experts * (counts / (top_k * tokens) * probabilities / tokens).sum(dim=1)  # [L]
            z = output.router.z_sums / tokens
        if config.model.num_nextn_predict_layers:  # tests/unit/moe/test_mtp.py has a slow version of this
            arguments = (batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.token_mask)
            ahead = model(*arguments, labels=batch.labels).mtp_cross_entropy_sum
            ahead = ahead / (batch.labels != -100).sum()
            outcome["mtp_losses"].append(ahead.item())
        optimizer.zero_grad()
        (cross_entropy + 0.3 * ahead + 0.1 * balance.sum() + 0.01 * z.sum()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        outcome["losses"].append(cross_entropy.item())
        outcome["balance_losses"].append(balance.mean().item())
        outcome["grad_norms"].append(norm.item())
    outcome["parameters"] = {name: p.detach().float() for name, p in model.named_parameters()}
    return outcome


def deviation(outcome: Outcome, oracle: Outcome) -> dict[str, float]:
    """Largest relative difference of each kind of result."""
    found = {
        key: max((abs(a - b) / abs(b) for a, b in zip(outcome[key], oracle[key], strict=True)), default=0.0)
        for key in ("losses", "balance_losses", "grad_norms", "mtp_losses")
    }
    assert outcome["parameters"].keys() == oracle["parameters"].keys()
    for name, expected in oracle["parameters"].items():
        difference = (outcome["parameters"][name] - expected).abs().max() / expected.abs().max()
        found["parameters"] = max(found.get("parameters", 0.0), difference.item())
    return found


def gather_parameters(engine: Engine, plan: ParallelPlan, ranks: Ranks) -> dict[str, Tensor]:
    """All parameters, with the slices of the experts concatenated in order."""
    mine = {name: tensor.float().cpu().clone() for name, tensor in engine.owned_parameters()}
    everywhere: list = [None] * ranks.world_size
    dist.all_gather_object(everywhere, mine)
    order = sorted(range(ranks.world_size), key=plan.ep_rank)
    names = {name for part in everywhere for name in part}
    return {name: torch.cat([everywhere[r][name] for r in order if name in everywhere[r]]) for name in names}


def run_many(overrides: list[list[str]]) -> list[Outcome]:
    """`train_small` for each list of overrides, one after another in the same processes."""
    return [train_small(*one) for one in overrides]
