"""The stage with a teacher: every layout equals a slow version in one process, over several steps."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from commands import prepare_corpus
from harness import run_ranks
from layouts import (
    FAMILY,
    RATE,
    ROWS,
    SmallRun,
    gather_parameters,
    oracle_model,
    oracle_optimizer,
    small_config,
)
from torch import Tensor

from moe.config import ModelConfig
from moe.hf import load_hf, save_hf
from moe.init import init_weights
from moe.model import CausalLM
from trainer.checkpoints.assemble import build_model
from trainer.engine.loss import agree_on_totals
from trainer.ranks.runtime import Ranks
from trainer.settings.config import RunConfig
from trainer.stages.distilled import Distilled
from trainer.stages.held_out import open_loader
from trainer.train import train_step

STEPS = 3
STUDENT = ["model.vocab_size=512", "model.router_aux_loss_coef=0", "balance.z_loss_coef=0"]
STUDENT += ["micro_batch_size=4", "deepspeed=zero0", "parallel.ep_size=1"]
HOW = ["distill=teacher", "distill.top_k=7", "distill.temperature=2", "distill.weight=0.6"]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Prepared rows, and a folder with a teacher that is of another family than the student, and larger."""
    folder = tmp_path_factory.mktemp("teacher")
    of_teacher = ["model.vocab_size=512", "model.num_hidden_layers=3", "model.hidden_size=48"]
    config = small_config(*FAMILY["shared_without_gate"], *of_teacher, "model.initializer_range=0.2")
    teacher = CausalLM(config.model)
    init_weights(teacher, seed=9)
    save_hf(teacher, folder / "hf")
    return [*prepare_corpus(folder), *STUDENT, *HOW, f"distill.teacher={folder}/hf"]


def train(cases: list[list[str]]) -> list[dict[str, Any]]:
    """Three steps of each case on these ranks."""
    found = []
    for overrides in cases:
        run = SmallRun(*overrides)
        build = partial(build_model, plan=run.plan, ranks=run.ranks)
        stage = Distilled(run.config, run.ranks, run.engine, run.balance, 0, build)
        result: dict[str, Any] = {"cross_entropy": [], "teacher_divergence": [], "loss": [], "norms": []}
        for _ in range(STEPS):
            batches = stage.micro_batches()
            totals = agree_on_totals(batches, False)
            sums, _, norm = train_step(run.engine, run.balance, stage.loss_shares, batches, totals, RATE)
            metrics = stage.metrics() | sums.over_ranks().describe(totals)
            for key in ("cross_entropy", "teacher_divergence", "loss"):
                result[key].append(metrics[key])
            result["norms"].append(norm)
        result["held out"] = stage.evaluate()["loss/validation"]
        result["parameters"] = gather_parameters(run.engine, run.plan, run.ranks)
        stage.close()
        run.engine.close()
        found.append(result)
    return found


def slow_divergence(student: Tensor, teacher: Tensor, config: RunConfig) -> Tensor:
    """Logits [T, V] of both -> the mean divergence over the most probable tokens and the rest."""
    how = config.distill
    ids = teacher.topk(how.top_k).indices
    p, q = (of.div(how.temperature).softmax(-1).gather(1, ids) for of in (teacher, student))
    p, q = (torch.cat([of, 1 - of.sum(-1, keepdim=True)], dim=1) for of in (p, q))
    p, q = (q, p) if how.divergence == "reverse" else (p, q)
    return (p * (p / q).log()).sum(-1).mean()


def slow(overrides: list[str]) -> dict[str, Any]:
    """The same steps in one process, in fp64, with all logits of both models."""
    config = small_config(*overrides, f"micro_batch_size={ROWS}")
    model = oracle_model(config)
    folder = Path(config.distill.teacher)
    teacher = CausalLM(ModelConfig.of_folder(folder), backend="reference")
    load_hf(teacher, folder)
    teacher.double()
    optimizer = oracle_optimizer(model, config)
    result: dict[str, Any] = {"cross_entropy": [], "teacher_divergence": [], "loss": [], "norms": []}
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    with open_loader(config, ranks) as loader:
        for _ in range(STEPS):
            (batch,) = next(loader)
            place = (batch.input_ids, batch.position_ids, batch.cu_seqlens)
            learned = batch.labels.flatten() != -100
            logits = model(*place, batch.token_mask).logits.flatten(0, 1)[learned]
            with torch.no_grad():
                said = teacher(*place).logits.flatten(0, 1)[learned]
            cross_entropy = F.cross_entropy(logits, batch.labels.flatten()[learned])
            divergence = slow_divergence(logits, said, config)
            loss = 0.4 * cross_entropy + 0.6 * 2**2 * divergence
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
            optimizer.step()
            for key, value in zip(result, (cross_entropy, divergence, loss, norm), strict=True):
                result[key].append(value.item())
    return result | {"parameters": {name: p.detach().float() for name, p in model.named_parameters()}}


LAYOUTS = {
    "zero0": [],
    "zero1-ep2": ["deepspeed=zero1", "parallel.ep_size=2"],
    "zero2-reverse": ["deepspeed=zero2", "distill.divergence=reverse"],
    "zero3-ep2": ["deepspeed=zero3", "parallel.ep_size=2"],
    "zero3-recompute": ["deepspeed=zero3", "recompute=full"],
}


def test_every_layout_equals_the_slow_version(overrides):
    cases = [[*overrides, *of] for of in LAYOUTS.values()]
    forward, reverse = slow(overrides), slow([*overrides, "distill.divergence=reverse"])
    assert forward["teacher_divergence"][-1] < forward["teacher_divergence"][0]
    for rank in run_ranks(train, 2, cases, timeout=240):
        for name, found in zip(LAYOUTS, rank, strict=True):
            expected = reverse if "reverse" in name else forward
            for key in ("cross_entropy", "teacher_divergence", "loss", "norms"):
                assert found[key] == pytest.approx(expected[key], rel=1e-5), (name, key)
            for parameter, value in expected["parameters"].items():
                apart = (found["parameters"][parameter] - value).abs().max() / value.abs().max()
                assert apart < 1e-5, (name, parameter, apart)
            assert found["held out"] == pytest.approx(rank[0]["held out"], rel=1e-5) or "reverse" in name
