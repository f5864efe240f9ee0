"""Being asked to stop: a handler only notes it, the loop acts at the end of the step."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

NAMES = "SIGTERM", "SIGINT", "SIGUSR1"
"""Of the signals that ask for it, those first that say why a run ended where several came."""

# Within which an interrupt is the same one: torchrun, interrupted by the terminal as its processes are, hands it on.
_SAME_SECONDS = 3.0


class StopRequest:
    """Notes SIGTERM, SIGINT and SIGUSR1 while it is entered (in the main thread); a later SIGINT raises
    KeyboardInterrupt.

    Attributes:
        signal: name of the first signal that came, or None.
    """

    def __init__(self):
        self.signal: str | None = None
        self._interrupted: float | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for name in NAMES:
            number = signal.Signals[name]
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
            if os.environ.get("RANK", "0") == "0":  # not print, which may be at work in what was interrupted
                os.write(2, b"\nInterrupted: it ends this step and saves; interrupted again, it ends at once.\n")
        elif now - self._interrupted > _SAME_SECONDS:
            raise KeyboardInterrupt
