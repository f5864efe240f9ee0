"""How far `prepare` is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress(total: int, what: str, report: Callable[[str], Any]) -> Iterator[Callable[[int], None]]:
    """`advance(bytes)`: a bar on a terminal, now and then a line elsewhere, the speed at the end.

    `what` has been done to these bytes: a participle.
    """
    console, start = Console(), time.perf_counter()
    done, last_line = 0, start
    columns = TextColumn(what), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def advance(size: int) -> None:
            nonlocal done, last_line
            done += size
            bar.advance(task, size)
            now = time.perf_counter()
            if not console.is_terminal and now - last_line >= _SECONDS_BETWEEN_LINES:
                last_line = now
                report(f"{what} {done / 1e6:.1f} of {total / 1e6:.1f} MB ({done / 1e6 / (now - start):.1f} MB/s).")

        yield advance
    seconds = time.perf_counter() - start
    report(f"{what} {done / 1e6:.1f} MB in {seconds:.1f} s ({done / 1e6 / seconds:.1f} MB/s).")
