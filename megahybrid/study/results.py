"""What a study's files say: runs.csv and fit.json, and plan.csv and prediction.json where there are any."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megahybrid.errors import UserError
from megahybrid.files import read_json
from megahybrid.study.law.law import Law
from megahybrid.study.table import Run, read_number, read_rows, read_runs

_NUMBERS = "A", "B", "E", "alpha", "beta", "a_opt", "parameters", "tokens", "loss"


@dataclass(frozen=True)
class Results:
    """All that a report is made from.

    Attributes:
        study: its name.
        runs: of runs.csv.
        fit: fit.json.
        planned: by cell, the GPU hours that plan.csv expects; empty where there is no plan.
        data: the identity of the data, where the plan knows it.
        frozen: by cell, what prediction.json says of these very held-out runs; empty where nothing was frozen.
    """

    study: str
    runs: Sequence[Run]
    fit: Mapping[str, Any]
    planned: Mapping[str, float]
    data: str
    frozen: Mapping[str, Mapping[str, Any]]

    @property
    def kinds(self) -> list[str]:
        """Those that were fitted, in the fit's order."""
        return list(self.fit["kinds"])

    @property
    def end(self) -> float:
        """FLOPs of the largest run that was fitted."""
        return max(run.flops for run in self.runs if run.fitted)

    @property
    def horizon(self) -> float:
        """FLOPs up to which it is worth looking: ten times the largest fitted run, or the largest run or target."""
        targets = [each["flops"] for law in self.fit["kinds"].values() for each in law["predictions"]]
        return max(10 * self.end, *[run.flops for run in self.runs], *targets)

    def law(self, kind: str) -> Law:
        """The one that was fitted to a kind."""
        return Law(*(self.fit["kinds"][kind][name] for name in ("A", "B", "E", "alpha", "beta")))

    def of(self, kind: str) -> list[Run]:
        """The kind's runs whose losses count, by parameters and tokens."""
        chosen = [run for run in self.runs if run.kind == kind and run.counts]
        return sorted(chosen, key=lambda run: (run.parameters, run.tokens))


def read_results(folder: Path) -> Results:
    """Read a study's folder.

    Raises UserError where runs.csv or fit.json is missing, or a file is not what its verb writes.
    """
    if not (folder / "runs.csv").is_file():
        raise UserError(f"'{folder}' has no runs.csv: run `megahybrid study collect` first.")
    runs = read_runs(folder / "runs.csv")
    fit = read_json(folder / "fit.json")
    if not isinstance(fit, dict) or not fit.get("kinds"):
        raise UserError(f"'{folder}' has no fit.json with a fitted kind: run `megahybrid study fit` first.")
    if not all(law["intervals"] for law in fit["kinds"].values()):
        raise UserError(f"The fit in '{folder}' has no intervals: run `megahybrid study fit` without --bootstrap 0.")
    if {run.kind for run in runs if run.fitted} != set(fit["kinds"]):
        raise UserError(f"runs.csv and fit.json in '{folder}' have other kinds: run `megahybrid study fit` again.")
    planned, data = read_plan(folder / "plan.csv")
    made = read_json(folder / "prediction.json") or {}  # by identity: a cell may have become another run since
    frozen = {run.cell: made[run.run] for run in runs if run.held_out and run.run in made}
    return Results(folder.resolve().name, runs, _with_nan(fit), planned, data, _with_nan(frozen))


def read_plan(path: Path) -> tuple[dict[str, float], str]:
    """GPU hours by cell, and the identity of the data, empty where they were not prepared yet."""
    rows = read_rows(path) if path.is_file() else []
    if missing := [name for name in ("cell", "gpu_hours", "data") if rows and name not in rows[0]]:
        raise UserError(f"'{path}' has no column {missing[0]}: run `megahybrid study plan` again.")
    hours = {row["cell"]: read_number(path, number, row, "gpu_hours") for number, row in enumerate(rows, start=1)}
    return hours, rows[0]["data"] if rows else ""


def _with_nan(value: Any) -> Any:
    """JSON has neither nan nor infinity: fit.json says null where a best size, say, is no finite number, and where an
    interval is open to that side."""
    if isinstance(value, list):
        ends = (-math.inf, *[math.inf] * (len(value) - 1))[: len(value)]
        return [end if each is None else _with_nan(each) for each, end in zip(value, ends, strict=True)]
    if isinstance(value, dict):
        return {
            name: math.nan if each is None and name in _NUMBERS else _with_nan(each) for name, each in value.items()
        }
    return value
