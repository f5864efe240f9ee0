"""Being asked to stop: a handler only notes it, the loop acts at the end of the step."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Notes SIGTERM and SIGUSR1 while it is entered (in the main thread).

    Attributes:
        signal: name of the first signal that came, or None.
    """

    def __init__(self):
        self.signal: str | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name
