"""Steps of the policy loss give the same results under every layout of ranks as a slow version on one."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from layouts import (
    RATE,
    ROWS,
    SEQ_LEN,
    VOCAB,
    Outcome,
    SmallRun,
    deviation,
    gather_parameters,
    micro_batches,
    oracle_model,
    oracle_optimizer,
    small_config,
)
from torch import Tensor

from data_pipeline.loader import Batch
from moe.balance import expert_frequencies
from moe.model import CausalLM, ModelOutput
from trainer.engine.loss import LossShares, Totals, agree_on_totals
from trainer.engine.policy import SUMS, PolicyBatch, policy_loss
from trainer.settings.parallel import ParallelPlan
from trainer.settings.rl import RLConfig, SamplingConfig
from trainer.train import train_step

TOLERANCE, STEPS = 1e-5, 2
SAMPLING = SamplingConfig(0.7, 1.0, 0, 0, 32, 8, False, "none")
TOKEN = RLConfig(2, 1, 8, SAMPLING, {}, "mean", "token", "token", 0.2, 0.28, "keep", "learn", 0, 0.1, None)
CONFIGS = {"token": TOKEN, "sequence": replace(TOKEN, ratio="sequence")}
LARGE = "model.initializer_range=0.3"  # so that the temperature and the experts affect the loss
# ZeRO-3 would never release the small weights of this model, nor one that it needs again soon
_ZERO3 = "++deepspeed.zero_optimization.stage3"
RELEASED = [f"{_ZERO3}_param_persistence_threshold=0", f"{_ZERO3}_max_reuse_distance=0"]
UNTIED = "model.tie_word_embeddings=false"
# ratio, ZeRO stage, ep_size, rows of a micro-batch, more overrides
LAYOUTS = [
    ("token", 0, 1, 8, []),
    ("sequence", 0, 2, 2, ["recompute=full"]),
    ("sequence", 1, 2, 4, []),
    ("token", 1, 1, 2, []),
    ("token", 2, 2, 2, []),
    ("sequence", 2, 1, 4, []),
    ("token", 3, 1, 4, RELEASED),
    ("sequence", 3, 2, 2, [*RELEASED, "recompute=full"]),
    ("token", 3, 2, 4, [*RELEASED, UNTIED]),
    ("token", 2, 2, 4, [UNTIED]),
]


def policy_batches(plan: ParallelPlan, rank: int, step: int) -> list[PolicyBatch]:
    """This rank's micro-batches of a step. What belongs to a row depends on its number alone."""
    return [_with_samples(batch, step) for batch in micro_batches(plan, rank, step)]


def _with_samples(batch: Batch, step: int) -> PolicyBatch:
    rows = []
    for row in batch.rows:
        generator = torch.Generator().manual_seed(1000 * step + row)
        rows.append(torch.randn(4, SEQ_LEN, generator=generator))
    first, second, advantages, weights = torch.stack(rows, dim=1)  # [B,S]
    weights = (weights.clamp(min=0) / (ROWS * SEQ_LEN)) * (batch.labels != -100)  # half of them are 0
    usual = -torch.tensor(VOCAB).log()
    values = {"sampled_log_probs": usual + first, "reference_log_probs": usual + second}
    return PolicyBatch(
        **vars(batch), **values, advantages=advantages, weights=weights, temperature=SAMPLING.temperature
    )


class Shares:
    """The loss of a stage for a kind of ratio; it also adds up the sums for metrics.

    held: the elements of the head's weight in memory between the forward and the backward, each time.
    """

    def __init__(self, ratio: str, model: CausalLM) -> None:
        self._config, self.sums = CONFIGS[ratio], torch.zeros(len(SUMS), dtype=torch.float64)
        self._head, self.held = model.lm_head, set[int]()

    def __call__(
        self, batch: Batch, output: ModelOutput, frequencies: Tensor | None, totals: Totals
    ) -> LossShares:
        assert isinstance(batch, PolicyBatch)
        assert output.cross_entropy_sum is None
        self.held.add(self._head.weight.numel())
        terms = policy_loss(output.log_probs, output.entropies, batch, self._config)
        self.sums += terms.sums
        return LossShares.of(terms.loss, output, frequencies, totals)


def train(ratio: str, overrides: list[str]) -> Outcome:
    """Train a small model for some steps on the ranks of the process group."""
    run = SmallRun(*overrides)
    shares = Shares(ratio, run.engine.module)
    outcome: Outcome = {"losses": [], "balance_losses": [], "grad_norms": [], "mtp_losses": []}
    for step in range(STEPS):
        batches = policy_batches(run.plan, run.ranks.rank, step)
        totals = agree_on_totals(batches, False)
        sums, _, norm = train_step(run.engine, run.balance, shares, batches, totals, RATE)
        metrics = sums.over_ranks().describe(totals)
        outcome["losses"].append(metrics["loss"])
        outcome["balance_losses"].append(metrics["balance_loss"])
        outcome["grad_norms"].append(norm)
    dist.all_reduce(shares.sums)
    outcome |= {"parameters": gather_parameters(run.engine, run.plan, run.ranks), "sums": shares.sums}
    outcome["held"] = shares.held
    run.engine.close()
    return outcome


def train_all(runs: list[tuple[str, list[str]]]) -> list[Outcome]:
    return [train(*one) for one in runs]


def slow(ratio: str, *overrides: str) -> Outcome:
    """The same in one process and fp64: all rows at once, from all logits, with autograd, torch's AdamW."""
    config = small_config(f"micro_batch_size={ROWS}", "experts.backend=reference", *overrides)
    model = oracle_model(config)
    shares, optimizer = Shares(ratio, model), oracle_optimizer(model, config)
    outcome: Outcome = {"losses": [], "balance_losses": [], "grad_norms": [], "mtp_losses": []}
    for step in range(STEPS):
        (batch,) = policy_batches(config.plan(1), 0, step)
        output = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.token_mask)
        log_softmax = (output.logits / SAMPLING.temperature).log_softmax(-1)
        log_probs = log_softmax.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
        entropies = -(log_softmax.exp() * log_softmax).sum(-1)
        output = output._replace(log_probs=log_probs, entropies=entropies)
        totals = Totals(batch.label_tokens, batch.tokens, sum(batch.lengths), False, False)
        terms = shares(batch, output, expert_frequencies(output.router.tokens_per_expert), totals)
        optimizer.zero_grad()
        terms.total(config).backward()
        outcome["losses"].append(terms.cross_entropy.item())
        outcome["balance_losses"].append(terms.balance.mean().item())
        outcome["grad_norms"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
    outcome["parameters"] = {name: p.detach().float() for name, p in model.named_parameters()}
    return outcome | {"sums": shares.sums}


def layout(stage: int, ep_size: int, rows: int, more: list[str]) -> list[str]:
    return [f"deepspeed=zero{stage}", f"parallel.ep_size={ep_size}", f"micro_batch_size={rows}", *more]


@pytest.mark.timeout(400)
def test_every_layout_equals_the_slow_version():
    runs = [(ratio, [LARGE, *layout(*rest)]) for ratio, *rest in LAYOUTS]
    outcomes = run_ranks(train_all, 2, runs, timeout=300)[0]
    for (ratio, overrides), outcome in zip(runs, outcomes, strict=True):
        expected = slow(ratio, *[one for one in overrides if one in (LARGE, UNTIED)])
        worst = deviation(outcome, expected)
        assert max(worst.values()) < TOLERANCE, (overrides, worst)
        assert (0 in outcome["held"]) == (RELEASED[0] in overrides)  # the weight was gathered again
        counts = [SUMS.index(name) for name in ("tokens", "clipped_low", "clipped_high")]
        assert torch.equal(outcome["sums"][counts], expected["sums"][counts])
        assert expected["sums"].min() > 0
        torch.testing.assert_close(outcome["sums"], expected["sums"], rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("stage", [0, 3])
def test_bf16_follows_the_slow_version(stage):
    """Within the bounds of test_layouts.py: bf16 adds noise; a wrong factor or a lost gradient adds more."""
    overrides = layout(stage, 2, 4, ["dtype=bf16", *(RELEASED if stage == 3 else [])])
    worst = deviation(run_ranks(train, 2, "token", overrides)[0], slow("token"))
    assert worst["losses"] < 1e-3, worst
    assert worst["grad_norms"] < 5e-3, worst
