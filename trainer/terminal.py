"""What a person sees while a run goes: a live line on a terminal, plain lines in a job log. Rank 0 only."""

import time
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trainer.config import RunConfig


class Terminal:
    """Progress of training on the terminal that the run was started from."""

    def __init__(self, stream: TextIO | None, total_steps: int) -> None:
        self._console = Console(file=stream, quiet=stream is None, highlight=False, soft_wrap=True)
        self._total_steps = total_steps
        self._live: Live | None = None
        if stream is not None and self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def say(self, message: str) -> None:
        """One line that stays."""
        if self._console.is_terminal:
            self._console.print(message, markup=False)
        else:
            self._console.print(f"{time.strftime('%H:%M:%S')} {message}", markup=False)

    def progress(self, metrics: dict[str, Any], saved_step: int) -> None:
        """The state of the run at a logged step; `saved_step` has the last checkpoint, 0 = none."""
        step, total = metrics["step"], self._total_steps
        eta = f"ETA {duration(metrics['eta_seconds'])}"
        learning = [f"loss {metrics['loss']:.3f}", f"grad {metrics['grad_norm']:.2f}"]
        balance = []
        if "balance_loss" in metrics:
            balance = [
                f"balance {metrics['balance_loss']:.3f}",
                f"busiest {1 + metrics['max_violation']:.1f}x",
            ]
        speed = [f"{metrics['tokens_per_second']:,.0f} tok/s", f"mfu {metrics['mfu']:.1%}"]
        if self._live is None:
            self.say("  ".join([f"step {step}/{total}", *learning, *balance, *speed, eta]))
            return
        learning.append(f"learning rate {metrics['learning_rate']:.2e}")
        if balance:
            balance.append(f"{metrics['dead_experts']} unused")
        speed += [f"waiting for data {metrics['stall_fraction']:.1%}", f"{metrics['memory_gib']:.1f} GiB"]
        saved = f"checkpoint of step {saved_step:,}" if saved_step else "no checkpoint yet"
        rows = Table.grid(padding=(0, 2))
        rows.add_row(ProgressBar(total, step, width=24), f"step {step:,} of {total:,}  {eta}")
        for title, parts in [
            ("learning", learning),
            ("balance", balance),
            ("speed", speed),
            ("saved", [saved]),
        ]:
            if parts:
                rows.add_row(Text(title, "dim"), Text("   ".join(parts)))
        self._live.update(Panel.fit(rows))

    def close(self) -> None:
        """End the live line."""
        if self._live is not None:
            self._live.stop()


def closing(
    config: RunConfig, metrics: dict[str, Any], unigram: dict[str, float | None], run_dir: Path
) -> str:
    """The last words of a finished run: what was reached, where it is, what to do next.

    `unigram` is, per source, the held-out cross entropy of knowing only how common each token is.
    """
    held_out = [
        f"{source} {metrics[f'loss/{source}']:.3f}"
        + (f" (token frequencies alone: {known:.3f})" if known else "")
        for source, known in unigram.items()
        if f"loss/{source}" in metrics
    ]
    rows = [("loss", f"{metrics['loss']:.3f} nats per token at step {metrics['step']:,}")]
    if held_out:
        rows.append(("held out", ", ".join(held_out)))
    rows.append(("speed", f"{metrics['tokens_per_second']:,.0f} tokens/s, MFU {metrics['mfu']:.1%}"))
    if "balance_loss" in metrics:
        experts = config.model.num_experts * config.model.num_moe_layers
        rows.append(
            (
                "experts",
                f"balance {metrics['balance_loss']:.3f} (1 = even), "
                f"busiest {1 + metrics['max_violation']:.1f} x the mean, "
                f"{metrics['dead_experts']} of {experts} unused in the last step",
            )
        )
    rows += [
        ("run", f"{run_dir}; for transformers: {run_dir}/checkpoints/step-{metrics['step']:08d}/hf"),
        ("next", f'python -m trainer.generate {run_dir} "def ", python -m trainer.report {run_dir}'),
    ]
    return "\n".join(["", *(f"  {name:<9} {value}" for name, value in rows)])


def duration(seconds: float) -> str:
    """3661 -> 1:01:01."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
