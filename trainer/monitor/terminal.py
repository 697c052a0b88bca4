"""Progress of a run: a live panel on a terminal, plain lines in a job log. Rank 0 only."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from data_pipeline.config import CHAT_KINDS
from trainer.engine.backends import Backends
from trainer.ranks.device import device_name
from trainer.settings.config import RunConfig
from trainer.settings.parallel import ParallelPlan
from trainer.settings.run_folder import pasted
from trainer.settings.secrets import redacted

# The live panel shows all of these for a step; a plain line shows the first two of each row.
_SHOWN = {
    "learning": ["loss {loss:.3f}", "grad {grad_norm:.2f}", "learning rate {learning_rate:.2e}"],
    "rewards": [
        *("reward {reward:.3f}", "{completion_tokens:.0f} tokens", "{truncated:.0%} truncated"),
        *("{flat_groups:.0%} of groups flat", "entropy {entropy:.2f}"),
    ],
    "teacher": ["divergence {teacher_divergence:.3f}", "cross entropy {cross_entropy:.3f}"],
    "balance": ["balance {balance_loss:.3f}", "busiest {busiest:.1f}x", "{dead_experts} unused"],
    "speed": [
        *("{tokens_per_second:,.0f} tok/s", "mfu {mfu:.1%}", "waiting for data {stall_fraction:.1%}"),
        "{memory_gib:.1f} GiB",
    ],
}
_NEEDS = {
    "rewards": "reward",
    "teacher": "teacher_divergence",
    "balance": "balance_loss",
}  # without this metric a row is left out


class Terminal:
    """Progress of training on the terminal that the run was started from."""

    def __init__(self, stream: TextIO | None, total_steps: int) -> None:
        # names of runs are shown as they are
        self._console = Console(
            file=stream, quiet=stream is None, highlight=False, emoji=False, soft_wrap=True
        )
        self._total_steps = total_steps
        self._live: Live | None = None
        if stream is not None and self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def say(self, message: str) -> None:
        """Print a line that stays above the live panel."""
        when = "" if self._console.is_terminal else time.strftime("%H:%M:%S ")
        self._console.print(when + redacted(message), markup=False)

    def progress(self, metrics: dict[str, Any], saved_step: int) -> None:
        """Show the run at a logged step; `saved_step` is the step of the last checkpoint, 0 = none."""
        step, total = metrics["step"], self._total_steps
        eta = f"ETA {timedelta(seconds=int(metrics['eta_seconds']))}"
        known = metrics | {"busiest": 1 + metrics.get("max_violation", 0.0)}
        parts = {
            title: [text.format(**known) for text in texts]
            for title, texts in _SHOWN.items()
            if _NEEDS.get(title, "loss") in metrics
        }
        if self._live is None:
            brief = [text for texts in parts.values() for text in texts[:2]]
            self.say("  ".join([f"step {step}/{total}", *brief, eta]))
            return
        parts["saved"] = [f"checkpoint of step {saved_step:,}" if saved_step else "no checkpoint yet"]
        rows = Table.grid(padding=(0, 2))
        rows.add_row(ProgressBar(total, step, width=24), f"step {step:,} of {total:,}  {eta}")
        for title, texts in parts.items():
            rows.add_row(Text(title, "dim"), Text("   ".join(texts)))
        self._live.update(Panel.fit(rows))

    def evaluated(self, step: int, held_out: dict[str, float]) -> None:
        """Print the results of an evaluation, except perplexities, which follow from the losses."""
        shown = (f"{key} {value:.3f}" for key, value in held_out.items() if not key.startswith("perplexity"))
        self.say(f"step {step}: {', '.join(shown)}")

    def close(self) -> None:
        """Remove the live panel."""
        if self._live is not None:
            self._live.stop()


def opening(
    config: RunConfig, plan: ParallelPlan, device: torch.device, backends: Backends, step: int
) -> str:
    """A line on the model, the hardware and batch of a run that starts, and why its first step is slow."""
    total, active = config.model.num_parameters(), config.model.num_active_parameters()
    devices = f"{plan.world_size} " if device.type == "cuda" else ""
    triton = backends.names.get("passes") == "Triton"
    return (
        f"{config.name}: {total / 1e6:,.1f}M parameters ({active / 1e6:,.1f}M active) "
        f"on {devices}{device_name(device)} ({', '.join(map(' '.join, backends.names.items()))}), "
        f"{plan.world_size} ranks, ep_size {plan.ep_size}, ZeRO {config.zero_stage}, "
        f"{plan.gradient_accumulation_steps} micro-batches per step, "
        f"{config.stage.step_tokens:,} tokens per step, {config.stage.total_steps:,} steps"
        + (f", going on after step {step}" if step else "")
        + ("\n  the first step compiles kernels, once per machine" if triton else "")
    )


def closing(config: RunConfig, metrics: dict[str, Any], results: dict[str, str], run_dir: Path) -> str:
    """The summary of a finished run, with the `results` of its stage and the next commands."""
    rows = {} if config.rl else {"loss": f"{metrics['loss']:.3f} nats per token at step {metrics['step']:,}"}
    rows |= {
        **results,
        "speed": f"{metrics['tokens_per_second']:,.0f} tokens/s, MFU {metrics['mfu']:.1%}",
    }
    if "balance_loss" in metrics:
        experts = config.model.num_experts * config.model.num_moe_layers
        rows["experts"] = (
            f"balance {metrics['balance_loss']:.3f} (1 = even), busiest {1 + metrics['max_violation']:.1f} x "
            f"the mean, {metrics['dead_experts']} of {experts} unused in the last step"
        )
    rows["run"] = f"{run_dir}; for transformers: {run_dir}/checkpoints/step-{metrics['step']:08d}/hf"
    prompt = '"    def __init__(self" --temperature 0.5'
    if {config.data.sources[name].kind for name in config.data.trained_sources()} <= set(CHAT_KINDS):
        prompt = '"Is 9 larger than 4? /no_think" --chat --no-thinking'
    here = pasted(run_dir)
    rows["next"] = f"python -m trainer.generate {here} {prompt}, python -m trainer.report {here}"
    return "\n".join(["", *(f"  {name:<9} {value}" for name, value in rows.items() if value)])
