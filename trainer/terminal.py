"""What a person sees while a run goes: a live line on a terminal, plain lines in a job log. Rank 0 only."""

import time
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text


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

    def progress(self, metrics: dict[str, Any]) -> None:
        """The state of the run at a logged step."""
        step, per_step = metrics["step"], metrics["step_seconds"]
        parts = [
            f"step {step}/{self._total_steps}",
            f"loss {metrics['loss']:.3f}",
            *([f"balance {metrics['balance_loss']:.3f}"] if "balance_loss" in metrics else []),
            f"grad {metrics['grad_norm']:.2f}",
            f"{metrics['tokens_per_second']:,.0f} tok/s",
            f"mfu {metrics['mfu']:.1%}",
            f"ETA {duration((self._total_steps - step) * per_step)}",
        ]
        line = "  ".join(parts)
        if self._live is not None:
            done = int(24 * step / self._total_steps)
            self._live.update(Text(f"{'━' * done}{'╌' * (24 - done)} {line}", no_wrap=True, overflow="ellipsis"))
        else:
            self.say(line)

    def close(self) -> None:
        """End the live line."""
        if self._live is not None:
            self._live.stop()


def duration(seconds: float) -> str:
    """3661 -> 1:01:01."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
