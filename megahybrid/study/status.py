"""`megahybrid study status`: how far a study is, a row a cell, and all of it by FLOPs."""

from __future__ import annotations

import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from megahybrid.launch import runs
from megahybrid.study.file import Study
from megahybrid.study.outcomes import Outcome, Survey, hours_by_run
from megahybrid.training.run_directory import duration

_STATES = ("done", "running", "waiting", "missing", "diverged", "failed")


@dataclass(frozen=True)
class Overall:
    """A study as a whole.

    Attributes:
        flops, done: of all runs, and of these what has been trained.
        states: how many cells are in which.
        hours: GPU hours taken, of `limit`.
    """

    flops: float
    done: float
    states: Counter[str]
    hours: float
    limit: float | None

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], limit: float | None) -> Overall:
        """A run that several cells share counts once; what has diverged or failed is not waited for."""
        each_run = {each.cell.identity: each for each in outcomes}.values()
        return cls(
            sum(each.flops for each in each_run if each.state not in ("diverged", "failed")),
            sum(each.flops_done for each in each_run if each.state not in ("diverged", "failed")),
            Counter(each.state for each in outcomes),
            hours_taken(outcomes),
            limit,
        )

    def __str__(self) -> str:
        share = self.done / self.flops if self.flops else 1.0
        states = ", ".join(f"{self.states[state]} {state}" for state in _STATES if self.states[state])
        of_limit = f" of {self.limit:g}" if self.limit is not None else ""
        hours = f"{self.hours:.3g}{of_limit} GPU hours"
        return f"[{'#' * int(20 * share):<20}] {share:.1%} of {self.flops:.3g} FLOPs, {hours}: {states}"

    def left(self, before: float, seconds: float) -> str:
        """How long the rest takes, at the speed since `before` FLOPs were done so many seconds ago."""
        speed = (self.done - before) / seconds if seconds > 0 else 0.0
        return duration((self.flops - self.done) / speed if speed > 0 else math.inf)


class StatusLine:
    """One line on the terminal that is written anew, under what is said; silent where standard error is none."""

    def __init__(self, say: Callable[[str], None]):
        self._say, self._shown = say, sys.stderr.isatty()

    def show(self, text: str) -> None:
        """Write it over the last one."""
        if self._shown:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{text[:width]}", end="", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.show("")
        self._say(text)


def hours_taken(outcomes: Sequence[Outcome]) -> float:
    """GPU hours measured so far, of every run once."""
    measured = hours_by_run(outcomes)
    return sum(measured.get(run, 0.0) for run in {each.cell.identity for each in outcomes if not each.cell.awaits})


def show(study: Study, say: Callable[[str], None], console: Console | None = None) -> None:
    """Print the table, why runs are in their state, and a line about all of it."""
    outcomes = Survey(study).look(runs.queued_jobs(say))
    console = console or Console()
    table = Table(box=None, header_style="bold")
    table.add_column("run", overflow="fold")
    for name in ("state", "step", "loss", "left", "job"):
        table.add_column(name, justify="left" if name in ("state", "job") else "right", no_wrap=name != "job")
    for each in outcomes:
        table.add_row(each.cell.name, *_row(each))
    console.print(table)
    for each in outcomes:
        if each.why:
            console.print(f"{each.cell.name}: {each.why}", markup=False, highlight=False)
    if gone := sum(each.collected is not None for each in outcomes):
        text = f"collected, directory gone: {gone} of the runs that are done, as runs.csv has them"
        console.print(text, markup=False, highlight=False)
    console.print(str(Overall.of(outcomes, study.limits.gpu_hours)), markup=False, highlight=False)


def _row(outcome: Outcome) -> list[str]:
    run = replace(outcome.run, state=outcome.state)
    if outcome.collected:
        return ["collected", "", f"{outcome.loss:.4f}", "", ""]
    loss = f"{run.last['loss']:.4f}" if run.last else ""
    return [run.state, f"{run.step}/{run.target}" if run.target else "", loss, runs.left(run), ", ".join(run.jobs)]
