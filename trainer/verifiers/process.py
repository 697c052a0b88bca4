"""The rank's hold on a worker: one check at a time, and an end to it whatever the check does. Torch-free."""

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

_START_SECONDS = 120.0  # for Python to start and to import a verifier, on a busy node
_ANSWER_BYTES = 1 << 16  # more than an answer has


class Part(NamedTuple):
    """What one verifier says of a sample; `failed`: the check itself went wrong, and the reward is 0."""

    reward: float
    reason: str
    failed: bool


class Worker:
    """A process of `worker.py`, in a session and with a temporary folder of its own."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(ignore_cleanup_errors=True)
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": self._folder.name}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trainer.verifiers.worker"],
                stdin=theirs.fileno(),
                env={**os.environ, **environment},
                start_new_session=True,  # the group that is killed; Ctrl-C does not reach it
            )

    def is_alive(self) -> bool:
        """Whether it can take a check."""
        return self._process.poll() is None

    def begin(self, job: dict[str, Any], seconds: float) -> None:
        """Start a check; `outcome` is None until it is over."""
        self._outgoing = memoryview(json.dumps(job).encode() + b"\n")
        self._incoming, self._closed = b"", False
        self._seconds, self._deadline = seconds, time.monotonic() + _START_SECONDS

    def exchange(self, events: int) -> None:
        """Send and receive what the socket takes and has, without waiting."""
        was_ready = self._is_ready()
        try:
            if events & selectors.EVENT_WRITE:
                self._outgoing = self._outgoing[self._socket.send(self._outgoing) :]
            if events & selectors.EVENT_READ:
                received = self._socket.recv(_ANSWER_BYTES)
                self._incoming += received
                self._closed = not received
        except OSError:  # it has ended
            self._closed = True
        if self._is_ready() and not was_ready:
            self._deadline = time.monotonic() + self._seconds

    def outcome(self) -> Part | None:
        """The result of the check, None while it may still come; ends a worker that will not answer."""
        answered = self._incoming.endswith(b"\n") and self._incoming.strip()
        if answered or len(self._incoming) > _ANSWER_BYTES:
            try:
                answer = json.loads(self._incoming)
                if "error" in answer:
                    return Part(0.0, answer["error"], True)
                return Part(answer["reward"], answer["reason"], False)
            except (ValueError, TypeError, KeyError):
                reason = "the worker's answer cannot be read"
        elif self._closed:
            reason = "the worker ended during the check"
        elif time.monotonic() >= self._deadline:
            late = f"took longer than {self._seconds:g} seconds"
            reason = late if self._is_ready() else f"did not start within {_START_SECONDS:g} seconds"
        else:
            return None
        self.end()
        return Part(0.0, reason, True)

    def end(self) -> None:
        """Kill the process with all that it started, and remove its folder."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.close()
        with suppress(RecursionError):  # a program may nest folders without end
            self._folder.cleanup()

    def _is_ready(self) -> bool:
        return self._incoming.startswith(b"\n")


def exchange(busy: list[Worker]) -> None:
    """Wait until a worker can send or receive, or its time is over, and exchange what can be."""
    with selectors.DefaultSelector() as selector:
        for worker in busy:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker._outgoing else 0)
            selector.register(worker._socket, events, worker)
        soonest = min(worker._deadline for worker in busy)
        for key, events in selector.select(max(0.0, soonest - time.monotonic())):
            key.data.exchange(events)
