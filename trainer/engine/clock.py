"""Measure where the time of a step goes."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StepClock:
    """Measures where the time between two laps goes.

    `wait` counts what the host waits for between steps, summed over all steps since the last lap, without the
    waits inside it. `part` counts the work inside a step while `measuring` is set; a part excludes the parts
    inside it. On a GPU a part is timed by events on the compute stream, read only at the lap; work on other
    streams is not counted.
    """

    def __init__(self, device: torch.device) -> None:
        self.measuring = False
        self._device, self._on_gpu = device, device.type == "cuda"
        self._stream = torch.cuda.default_stream(device) if self._on_gpu else None
        self._started = time.perf_counter()
        self._waits: defaultdict[str, float] = defaultdict(float)
        self._spans: list[tuple[str, Any, Any, str | None]] = []  # name, start, end, name of the part around
        self._open: str | None = None

    @contextmanager
    def wait(self, name: str) -> Iterator[None]:
        """Count the time inside as waiting for `name`, except in a `wait` inside."""
        start, before = time.perf_counter(), sum(self._waits.values())
        yield
        inside = sum(self._waits.values()) - before
        self._waits[name] += time.perf_counter() - start - inside

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside as the part `name` of a measured step."""
        if not self.measuring or (self._on_gpu and torch.cuda.current_stream(self._device) != self._stream):
            yield
            return
        start, around, self._open = self._mark(), self._open, name
        yield
        self._spans.append((name, start, self._mark(), around))
        self._open = around

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with each call counted as a `part`, and also each `wait` on the handle it returns."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                work = function(*args, **kwargs)
            return _TimedWork(self, name, work) if self.measuring and hasattr(work, "wait") else work

        return call

    def lap(self) -> tuple[float, dict[str, float], dict[str, float]]:
        """Seconds since the last lap, in each `wait` since then, and in each `part` of the measured step."""
        parts: defaultdict[str, float] = defaultdict(float)
        if self._spans:
            synchronize(self._device)
        for name, start, end, around in self._spans:
            seconds = start.elapsed_time(end) / 1000 if self._on_gpu else end - start
            parts[name] += seconds
            if around is not None:
                parts[around] -= seconds
        now = time.perf_counter()
        result = (now - self._started, dict(self._waits), dict(parts))
        self._started, self.measuring = now, False
        self._waits.clear()
        self._spans.clear()
        return result

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _TimedWork:
    """The handle of an asynchronous collective, with its `wait` counted as a part."""

    def __init__(self, clock: StepClock, name: str, work: Any) -> None:
        self._clock, self._name, self._work = clock, name, work

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock.part(self._name):
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished all its queued work; do nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
