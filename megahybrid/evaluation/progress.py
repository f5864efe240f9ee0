"""One line on the terminal: how much has been read, and how long the rest will take."""

from __future__ import annotations

import sys
import time

from megahybrid.training.run_directory import duration

_SECONDS_BETWEEN = 0.5


class Progress:
    """A bar that rewrites its line; silent where standard error is no terminal, or `shown` is false."""

    def __init__(self, total: int, shown: bool = True):
        """`total`: tokens to read; `done` counts those that have been."""
        self._total, self.done, self._shown = total, 0, shown and sys.stderr.isatty()
        self._began = self._last = time.monotonic()

    def add(self, tokens: int, what: str) -> None:
        """So many tokens more have been read, of `what`."""
        self.done += tokens
        now = time.monotonic()
        if not self._shown or (now - self._last < _SECONDS_BETWEEN and self.done < self._total):
            return
        self._last = now
        share = min(self.done / max(self._total, 1), 1)
        left = duration((now - self._began) * (1 / share - 1)) if share else "?"
        bar = "#" * round(20 * share)
        read = f"{self.done / 1e6:,.1f} of {self._total / 1e6:,.1f} M tokens"
        print(f"\r\033[K[{bar:<20}] {read}, {left} left, {what}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clear the line."""
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
