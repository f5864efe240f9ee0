"""Shards made ready in the background, in the order in which they will be read."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

from megahybrid.errors import MachineFault


class Fetcher:
    """Runs `fetch(number)` once for every number, on its own threads: what is required first, then what lies ahead."""

    def __init__(self, fetch: Callable[[int], None], describe: Callable[[int], str], threads: int, seconds: float):
        """`fetch` returns when a number is ready or raises; `describe` names it in messages.

        `seconds`: how long `require` waits.
        """
        self._fetch = fetch
        self._describe = describe
        self._seconds = seconds
        self._changed = threading.Condition()
        self._required: deque[int] = deque()
        self._ahead: deque[int] = deque()
        self._running: set[int] = set()
        self._ready: set[int] = set()
        self._errors: dict[int, Exception] = {}
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def look_ahead(self, numbers: Iterable[int]) -> None:
        """What will be required next, in this order; replaces what was named before."""
        with self._changed:
            self._ahead = deque(numbers)
            self._changed.notify_all()

    def require(self, number: int) -> None:
        """Wait until a number is ready.

        Raises what `fetch` raised for it just now, and MachineFault if it takes too long. An error from looking ahead
        is not final: it is tried again.
        """
        if number in self._ready:
            return
        with self._changed:
            self._errors.pop(number, None)
            if number not in self._running:
                self._required.append(number)
                self._changed.notify_all()
            if not self._changed.wait_for(lambda: number in self._ready or number in self._errors, self._seconds):
                raise MachineFault(
                    f"{self._describe(number)} was not there after {self._seconds:g} s; check the connection and "
                    "start again."
                )
            if number in self._errors:
                raise self._errors.pop(number)

    def forget(self, number: int) -> None:
        """It is not ready any more."""
        with self._changed:
            self._ready.discard(number)

    def close(self) -> None:
        """End the threads, those that are fetching when they have done so."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                number = self._next()
                while number is None and not self._closed:
                    self._changed.wait()
                    number = self._next()
                if self._closed or number is None:
                    return
                self._running.add(number)
            error = None
            try:
                self._fetch(number)
            except Exception as caught:
                error = caught
            with self._changed:
                self._running.discard(number)
                if error is None:
                    self._ready.add(number)
                else:
                    self._errors[number] = error
                self._changed.notify_all()

    def _next(self) -> int | None:
        for queue in (self._required, self._ahead):
            while queue:
                number = queue.popleft()
                if number not in self._ready and number not in self._running:
                    return number
        return None
