"""The model card of an exported run: README.md and a picture of its curves, for the Hugging Face hub."""

import json
from pathlib import Path

from data_pipeline.manifest import write_atomically
from moe.config import ModelConfig
from trainer.monitor.report import Run, draw
from trainer.settings.benchmarks import Score, score_rows
from trainer.settings.hub import is_hub_name

CARD, CURVES = "README.md", "training.png"
_CURVES = {"training loss, nats per token": ["loss"], "held-out loss, nats per token": ["loss/*"]}
_REWARDS = {"mean reward": ["reward"], "held-out reward, greedy": ["reward/*"]}


def write_card(run_dir: Path, out: Path, config: ModelConfig) -> None:
    """Write the card of a run into a folder, unless the folder has one, which may be its user's.

    It holds what the run trained on and what it measured, and no path of this machine.
    """
    if (out / CARD).exists():
        return
    run = Run.read(run_dir)
    draw([run], _REWARDS if run.config.rl is not None else _CURVES).savefig(out / CURVES, dpi=80)
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if (base := run.config.stage.init_from) is not None and is_hub_name(base):
        front["base_model"] = base.partition("@")[0]
    head = "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items())
    text = "\n\n".join([f"---\n{head}---", f"# {run.config.name}", *_sections(run, config)])
    write_atomically(out / CARD, f"{text}\n".encode())  # a card that is there is kept


def _sections(run: Run, config: ModelConfig) -> list[str]:
    total, active = config.num_parameters() / 1e6, config.num_active_parameters() / 1e6
    kind, stage = config.to_hf()["model_type"], run.config.stage
    if config.num_experts:
        kind += f", {config.num_experts} experts, {config.num_experts_per_tok} per token"
    model = {
        "Architecture": f"{kind}, {config.num_hidden_layers} layers",
        "Parameters": f"{total:,.1f}M, of which {active:,.1f}M act on each token",
        "Context": f"{config.max_position_embeddings:,} tokens",
    }
    trained = {
        "Tokens": f"{run.last('tokens', 0):,.0f} of {stage.train_tokens:,}",
        "Rows of": f"{stage.seq_len:,} tokens, {stage.global_batch_size:,} a step",
        "Optimizer": f"AdamW, learning rate {run.config.optimizer.lr:g}, {run.config.schedule.kind}",
        "Precision": run.config.dtype,
    }
    unit = "tokens" if run.config.rl is None else "prompts"
    read = {
        f"`{source}`": f"{run.last(f'sources/{source}/{unit}', 0):,.0f} {unit}, "
        f"{run.last(f'sources/{source}/epochs', 0):.2f} epochs"
        for source in sorted(run.config.data.trained_sources())
    }
    measured = {
        f"`{key}`": f"{run.last(key):.4f}"
        for key in sorted({key for point in run.points for key in point})
        if key in ("loss", "reward") or key.startswith(("loss/", "reward/"))
    }
    benchmarks = {
        f"{score.task}, {score.metric}": " ".join([*shown[2:], _how(score)])
        for score, shown in zip(run.scores, score_rows(run.scores), strict=True)
    }
    tables = {"Model": model, "Training": trained, "Data": read, "Measured at the end": measured}
    tables |= {"Benchmarks (lm-eval)": benchmarks} if benchmarks else {}
    return [*(f"## {title}\n\n{_table(rows)}" for title, rows in tables.items()), f"![curves]({CURVES})"]


def _how(score: Score) -> str:
    """How a score was measured, as far as it changes what it means."""
    about, said = score.about, [f"step {score.step:,}"]
    said += [f"{about['num_fewshot']}-shot"] if about.get("num_fewshot") is not None else []
    said += [f"{about['samples']} documents"] if about.get("limit") is not None else []
    said += ["chat template"] if about.get("chat") else []
    return f"({', '.join(said)})"


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])
