"""Where the time of a step goes, the device's peak, memory."""

import re
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

# Dense bf16 peak in FLOP/s by vendor data sheets, by a part of the device's name; the first that fits counts.
_PEAKS = {"GB200": 2.5e15, "B300": 2.25e15, "B200": 2.25e15, "H200": 989e12}  # GH200 too
_PEAKS |= {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12, "H20": 148e12}
_PEAKS |= {"A100": 312e12, "A800": 312e12, "L40S": 362e12, "MI300X": 1307e12}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s of one rank's device: of the table for known GPUs in bf16, else measured by a product."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if known := [peak for part, peak in _PEAKS.items() if part in name]:
            return known[0]
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        _synchronize(device)
        start = time.perf_counter()
        a @ a
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_gib(device: torch.device) -> dict[str, float]:
    """Peak memory of this rank so far: allocated and reserved on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return {
            "memory_gib": torch.cuda.max_memory_allocated(device) / 2**30,
            "memory_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
        }
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def available_memory() -> int:
    """Bytes of host memory that may still be taken, within the limits of all cgroups; 0 where unknown."""
    rooms = []
    with suppress(OSError):
        meminfo = Path("/proc/meminfo").read_text()
        rooms.append(1024 * int(meminfo.partition("MemAvailable:")[2].split()[0]))
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            limit = "memory.limit_in_bytes" if controllers else "memory.max"  # version 1, version 2
            group = Path(f"/sys/fs/cgroup/{'memory' if controllers else ''}{path}")
            for folder in (group, *group.parents):
                with suppress(OSError, ValueError, IndexError):  # another controller, or no limit
                    used = re.findall(r"(?m)^(?:anon|total_rss) (\d+)", (folder / "memory.stat").read_text())
                    rooms.append(int((folder / limit).read_text()) - int(used[0]))
    return min(rooms, default=0)


class StepClock:
    """Where the time between two laps goes.

    `wait` is for what the host waits for between steps, summed over all of them. `part` is for what a step
    does, in steps with `measuring` set; parts leave out the parts inside them. On a GPU its marks are events
    on the compute stream, which nobody waits for before the lap; what runs on other streams takes no part.
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
        """Count the time inside as waiting for `name`."""
        start = time.perf_counter()
        yield
        self._waits[name] += time.perf_counter() - start

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
        """`function`, each call of which is a `part`, and each wait for the work that a call began."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                work = function(*args, **kwargs)
            return _TimedWork(self, name, work) if self.measuring and hasattr(work, "wait") else work

        return call

    def lap(self) -> tuple[float, dict[str, float], dict[str, float]]:
        """Seconds since the last lap, of these each `wait`, and each `part` of the measured step."""
        parts: defaultdict[str, float] = defaultdict(float)
        if self._spans:
            _synchronize(self._device)
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
    """The handle of an asynchronous collective, whose `wait` is a part."""

    def __init__(self, clock: StepClock, name: str, work: Any) -> None:
        self._clock, self._name, self._work = clock, name, work

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock.part(self._name):
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
