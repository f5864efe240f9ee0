"""Writing metrics.jsonl: every line once and in order, also over times in which the disk does not take it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megahybrid.retry import Patience


class MetricsFile:
    """The end of a metrics.jsonl whose lines are whole; one process writes it."""

    def __init__(self, path: Path, check: Callable[[], None] = lambda: None):
        """`check` raises what forbids to write, or OSError where it cannot tell now; called before every write."""
        self._path, self._check = path, check
        self._end: int | None = None  # bytes of whole lines on disk
        self._waiting: list[bytes] = []
        self._patience = Patience()

    def add(self, metrics: dict[str, Any]) -> None:
        """Append a line, or keep it until the disk takes it. Raises as `Patience.bear`."""
        self._waiting.append(json.dumps(metrics).encode() + b"\n")
        try:
            self.write()
        except OSError as fault:
            self._patience.bear(str(self._path), fault)

    def write(self) -> None:
        """Write the lines that wait. Raises OSError where the disk does not take them: they go on waiting."""
        if not self._waiting:
            return
        self._check()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = b"".join(self._waiting)
        with open(os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
            size = file.seek(0, os.SEEK_END)
            self._end = size if self._end is None else min(self._end, size)
            file.seek(self._end)  # over what a write of these lines that failed may have left
            file.write(lines)
        self._end += len(lines)
        self._waiting.clear()
        self._patience.relax()
