"""metrics.jsonl: every line once and in the order of steps, also over times in which the disk does not take it.

A long run's file has gigabytes, so what a start wants of it is looked for from its end.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megahybrid.retry import Patience

OWN_KEYS = {
    *("step", "tokens", "loss", "grad_norm", "learning_rate", "skipped", "repeated"),
    *("tokens_per_second", "data_seconds", "checkpoint_seconds", "mfu", "memory_bytes", "validation_loss"),
}
"""What lines have beside probes' keys and regulators'; docs/checkpoints.md says what each is."""
_BLOCK = 2**18  # bytes


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


def cut(path: Path, step: int) -> None:
    """Remove the lines after `step`, and a last one that is not whole; reads little more than what it removes."""
    with open(path, "rb+") as file:
        start, line = _last_until(file, step)
        end = start + len(line)
        if file.seek(0, os.SEEK_END) > end:
            file.truncate(end)
        if line and not line.endswith(b"\n"):  # the next one begins where this one ends
            file.seek(end)
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())


def lines_after(path: Path, step: int) -> Iterator[dict[str, Any]]:
    """The whole lines of the steps after `step`, the first of them first; none is held."""
    with open(path, "rb") as file:
        start, line = _last_until(file, step)
        file.seek(start + len(line))
        yield from filter(None, map(_parsed, file))


def first_line(path: Path) -> dict[str, Any]:
    """The first whole line; nothing where there is none."""
    with open(path, "rb") as file:
        return next(filter(None, map(_parsed, file)), {})


def lines_backwards(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines, the last one first."""
    with open(path, "rb") as file:
        yield from filter(None, (_parsed(line) for _, line in _backwards(file)))


def _last_until(file: BinaryIO, step: int) -> tuple[int, bytes]:
    """The last whole line up to `step`, and where it begins; nothing at 0 where there is none."""
    for start, line in _backwards(file):
        if (metrics := _parsed(line)) and metrics["step"] <= step:
            return start, line
    return 0, b""


def _parsed(line: bytes) -> dict[str, Any] | None:
    """None for what was torn."""
    with contextlib.suppress(ValueError):
        metrics = json.loads(line)
        if isinstance(metrics, dict) and "step" in metrics:
            return metrics
    return None


def _backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines from the last to the first, their ends included, each with where it begins."""
    position, tail = file.seek(0, os.SEEK_END), []  # tail: what is known of a line, its end first
    while position:
        size = min(_BLOCK, position)
        position -= size
        file.seek(position)
        first, *others = file.read(size).split(b"\n")
        start = position + size
        for part in reversed(others):
            start -= len(part)
            if line := part + b"".join(reversed(tail)):
                yield start, line
            start, tail = start - 1, [b"\n"]
        tail.append(first)
    if line := b"".join(reversed(tail)):
        yield 0, line
