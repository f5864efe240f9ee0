"""What a study's files say: runs.csv and fit.json, and plan.csv and prediction.json where there are any."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megahybrid.errors import UserError
from megahybrid.files import read_json


@dataclass(frozen=True)
class Run:
    """A row of runs.csv, as `collect` writes it, without the columns that no report needs; nan where a number is not
    known."""

    cell: str
    run: str
    kind: str
    size: str
    budget: float
    seed: str
    role: str
    trunk: str
    held_out: bool
    retry_of: str
    parameters: float
    tokens: float
    flops: float
    flops_per_token: float
    learning_rate: float
    batch_tokens: float
    gpu_hours: float
    loss: float
    state: str
    excluded: str
    code_version: str
    began: str

    @property
    def counts(self) -> bool:
        """Whether its loss is one that the law should give."""
        return self.state == "done" and not self.excluded and math.isfinite(self.loss)

    @property
    def fitted(self) -> bool:
        """Whether the law was fitted to it."""
        return self.counts and not self.held_out


@dataclass(frozen=True)
class Planned:
    """A row of plan.csv, likewise."""

    cell: str
    gpu_hours: float
    data: str


Row = TypeVar("Row", Run, Planned)

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

    def of(self, kind: str) -> list[Run]:
        """The kind's runs whose losses count, by parameters and tokens."""
        chosen = [run for run in self.runs if run.kind == kind and run.counts]
        return sorted(chosen, key=lambda run: (run.parameters, run.tokens))


def read_results(folder: Path) -> Results:
    """Read a study's folder.

    Raises UserError where runs.csv or fit.json is missing, or a file is not what its verb writes.
    """
    runs = _read(folder / "runs.csv", Run)
    if runs is None:
        raise UserError(f"'{folder}' has no runs.csv: run `megahybrid study collect` first.")
    fit = read_json(folder / "fit.json")
    if not isinstance(fit, dict) or not fit.get("kinds"):
        raise UserError(f"'{folder}' has no fit.json with a fitted kind: run `megahybrid study fit` first.")
    if not all(law["intervals"] for law in fit["kinds"].values()):
        raise UserError(f"The fit in '{folder}' has no intervals: run `megahybrid study fit` without --bootstrap 0.")
    if {run.kind for run in runs if run.fitted} != set(fit["kinds"]):
        raise UserError(f"runs.csv and fit.json in '{folder}' have other kinds: run `megahybrid study fit` again.")
    plan = _read(folder / "plan.csv", Planned) or []
    planned, data = {each.cell: each.gpu_hours for each in plan}, plan[0].data if plan else ""
    made = read_json(folder / "prediction.json") or {}  # by identity: a cell may have become another run since
    frozen = {run.cell: made[run.run] for run in runs if run.held_out and run.run in made}
    return Results(folder.resolve().name, runs, _with_nan(fit), planned, data, _with_nan(frozen))


def _with_nan(value: Any) -> Any:
    """JSON has no nan: fit.json says null where an end of an interval, or a best size, is not a finite number."""
    if isinstance(value, list):
        return [math.nan if each is None else _with_nan(each) for each in value]
    if isinstance(value, dict):
        return {
            name: math.nan if each is None and name in _NUMBERS else _with_nan(each) for name, each in value.items()
        }
    return value


def _read(path: Path, row: type[Row]) -> list[Row] | None:
    """A table's rows, of which other columns are left out; None where there is no table."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
    except FileNotFoundError:
        return None
    return [_row(path, number, line, row) for number, line in enumerate(lines, start=2)]


def _row(path: Path, number: int, line: Mapping[str, str], row: type[Row]) -> Row:
    values = {}
    for field in dataclasses.fields(row):
        text = line.get(field.name)
        try:
            values[field.name] = _value(field.type, text)
        except (AttributeError, TypeError, ValueError):
            raise UserError(
                f"Line {number} of '{path}' has no {field.name}{f' ({text})' if text else ''}: let the verb that wrote "
                "it write it again."
            ) from None
    return row(**values)


def _value(kind: str, text: str) -> Any:
    if kind == "bool":
        return bool(int(text))
    return (float(text) if text.strip() else math.nan) if kind == "float" else text.strip()
