"""Stop signals. Torch-free, so that a rank can listen before its slow imports."""

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)  # NCCL takes SIGUSR1


class StopRequest:
    """Set by a stop signal; the loop asks all ranks to agree on it."""

    def __init__(self) -> None:
        self.requested = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the launcher holds them back until now

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
