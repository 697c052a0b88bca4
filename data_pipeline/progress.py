"""How far a preparation is: a bar on a terminal, a line now and then elsewhere."""

import time

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class PrepareProgress(Progress):
    """Counts bytes of input against their total, and `unit` per second of this attempt, under a `title`.

    Bytes that an earlier attempt has finished count as done and not towards the speed.
    """

    def __init__(self, title: str, unit: str, total_bytes: int, done_bytes: int) -> None:
        columns = TextColumn(title), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}")
        super().__init__(*columns, TimeRemainingColumn())
        self.disable = not self.console.is_terminal
        self._bytes = self.add_task(title, total=total_bytes, completed=done_bytes, rate="")
        self._title, self._unit, self._units, self._done_before = title, unit, 0, done_bytes
        self._started = self._last_line = time.monotonic()

    def done(self, input_bytes: int, units: int) -> None:
        """A slice is finished."""
        now, self._units = time.monotonic(), self._units + units
        seconds = max(now - self._started, 1e-9)
        rate = f"{self._units / seconds:,.0f} {self._unit}/s"
        self.update(self._bytes, advance=input_bytes, rate=rate)
        if self.disable and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line, [task] = now, self.tasks
            left = (task.remaining or 0) * seconds / max(task.completed - self._done_before, 1)
            print(f"{self._title}: {task.percentage:.0f}%, {rate}, {left:,.0f} s left", flush=True)
