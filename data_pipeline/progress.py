"""How far a preparation is: a bar on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class PrepareProgress:
    """Counts bytes of input against their total, and `unit` per second of this attempt, under a `title`.

    Bytes that an earlier attempt has finished count as done and not towards the speed.
    """

    def __init__(self, title: str, unit: str, total_bytes: int, done_bytes: int) -> None:
        self._title, self._unit, self._console = title, unit, Console()
        self._total, self._done, self._left_at_start = total_bytes, done_bytes, total_bytes - done_bytes
        self._units = 0
        self._started = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn(title),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total_bytes, completed=done_bytes, rate="")

    def __enter__(self) -> "PrepareProgress":
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def advance(self, input_bytes: int, units: int) -> None:
        """A slice is finished."""
        self._done += input_bytes
        self._units += units
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        rate = f"{self._units / seconds:,.0f} {self._unit}/s"
        self._bar.update(self._task, advance=input_bytes, rate=rate)
        if not self._console.is_terminal and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            done_now = self._left_at_start - (self._total - self._done)
            left = (self._total - self._done) * seconds / max(done_now, 1)
            print(f"{self._title}: {self._done / self._total:.0%}, {rate}, {left:,.0f} s left", flush=True)
