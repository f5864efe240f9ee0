"""Runs as a CSV file has them: a study's runs.csv, or another's table."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megahybrid.errors import UserError

Row = Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """A row, by the columns that `collect` writes, without those that nobody reads; where there is no column a number
    is nan.

    Attributes:
        cell: its name.
        run: its identity.
        kind: "all" where the table has none.
        trunk: what runs share noise by; where the table has none, of each run another.
        held_out: whether no fit may see it.
        retry_of: the identity of the run in whose place it was trained, or empty.
        state: "done" where the table has none.
        excluded: why no fit may see it, or empty.
        parameters, tokens, flops: where one of the last two is missing, flops = 6 · parameters · tokens.
        loss: nats a token; nan of a run that is not done.
    """

    cell: str = ""
    run: str = ""
    kind: str = "all"
    size: str = ""
    budget: float = math.nan
    seed: str = ""
    role: str = ""
    trunk: str = ""
    held_out: bool = False
    retry_of: str = ""
    parameters: float = math.nan
    parameters_without_embedding: float = math.nan
    tokens: float = math.nan
    flops: float = math.nan
    flops_per_token: float = math.nan
    learning_rate: float = math.nan
    batch_tokens: float = math.nan
    gpu_hours: float = math.nan
    loss: float = math.nan
    state: str = "done"
    excluded: str = ""
    code_version: str = ""
    began: str = ""

    @property
    def counts(self) -> bool:
        """Whether its loss is one that the law should give."""
        return self.state == "done" and not self.excluded

    @property
    def fitted(self) -> bool:
        """Whether the law is fitted to it."""
        return self.counts and not self.held_out


COLUMNS = tuple(field.name for field in dataclasses.fields(Run))
"""That are read; `parameters`, `loss` and one of `tokens` and `flops` must be there."""

FIT_COLUMNS = (
    *("cell", "run", "kind", "trunk", "held_out", "retry_of", "state", "excluded"),
    *("parameters", "parameters_without_embedding", "tokens", "flops", "loss"),
)
"""Those of them that a fit is made of."""

_POSITIVE = "parameters", "parameters_without_embedding", "tokens", "flops", "loss"
"""Numbers that a fit is made of."""


def parse_columns(text: str) -> dict[str, str]:
    """`parameters=Model Size,loss=loss` as a dictionary. Raises UserError."""
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    names = {ours.strip(): theirs.strip() for ours, theirs in pairs}
    wrong = [ours for ours, theirs in names.items() if ours not in COLUMNS or not theirs]
    if wrong or len(names) < len(pairs):
        which = f"has '{wrong[0]}'" if wrong else "names a column twice"
        raise UserError(f"--columns {which}; give pairs NAME=COLUMN with each NAME once, one of {', '.join(COLUMNS)}.")
    return names


def read_runs(
    path: Path,
    columns: Mapping[str, str] | None = None,
    drop_largest_losses: int = 0,
    wanted: Sequence[str] = COLUMNS,
) -> list[Run]:
    """Read a table of runs.

    Args:
        path: a CSV file with a line of names.
        columns: the file's names of our columns; other columns are not read. Those of `wanted` when left out.
        drop_largest_losses: how many runs to exclude for it.
        wanted: COLUMNS, or some of them.

    Raises UserError for a file that cannot be read, a missing column, a number that is none, or is not finite and
    above 0, a run that is there twice, and more runs to drop than there are.
    """
    rows = read_rows(path)
    names = dict(columns) if columns else {name: name for name in wanted if name in rows[0]}
    _check_names(path, names, rows[0])
    runs = [_run(path, number, row, names) for number, row in enumerate(rows, start=1)]
    _refuse_twice(path, runs)
    return _without_largest(runs, drop_largest_losses)


def read_rows(path: Path) -> list[Row]:
    """A CSV file's rows by the names of its columns, at least one. Raises UserError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows, names = list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"'{path}' cannot be read as a CSV file: {reason}.") from None
    if not rows:
        raise UserError(f"'{path}' has no runs; it needs a line of column names and one for each run.")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"'{path}' has a column {twice[0]} twice; rename one.")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise UserError(f"Run {number} of '{path}' has not as many columns as the first line has names; mend it.")
    return rows


def read_number(path: Path, number: int, row: Row, column: str) -> float:
    """Of a run, counted from 1; nan where there stands nothing. Raises UserError for anything else."""
    text = row[column].strip()
    try:
        return float(text) if text else math.nan
    except ValueError:
        raise UserError(f"Run {number} of '{path}' has {column} = '{text}'; it must be a number: mend it.") from None


def _check_names(path: Path, names: Mapping[str, str], row: Row) -> None:
    for theirs in names.values():
        if theirs not in row:
            raise UserError(f"'{path}' has no column '{theirs}'; it has {', '.join(row)}.")
    needed = [name for name in ("parameters", "loss") if name not in names]
    if "tokens" not in names and "flops" not in names:
        needed.append("tokens or flops")
    if needed:
        raise UserError(
            f"'{path}' has no column for {needed[0]}; name it, as in --columns \"parameters=Model Size,flops=Training "
            'FLOP,loss=loss".'
        )


def _run(path: Path, number: int, row: Row, names: Mapping[str, str]) -> Run:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Run):
        if field.name not in names:
            continue
        column = names[field.name]
        if field.type == "float":
            values[field.name] = read_number(path, number, row, column)
        elif field.type == "str":
            values[field.name] = row[column].strip()
        elif row[column].strip() in ("0", "1"):
            values[field.name] = row[column].strip() == "1"
        else:
            raise UserError(f"Run {number} of '{path}' has {column} = '{row[column]}'; it must be 0 or 1.")
    run = Run(**values)
    for name in _POSITIVE:
        needed = name in names and (name != "loss" or run.state == "done")
        if needed and not (math.isfinite(value := getattr(run, name)) and value > 0):
            column = names[name]
            raise UserError(
                f"Run {number} of '{path}' has {column} = '{row[column].strip()}'; it must be a finite number above 0: "
                "correct it, or leave the run out."
            )
    if "tokens" not in names:
        run = replace(run, tokens=run.flops / (6 * run.parameters))
    if "flops" not in names:
        run = replace(run, flops=6 * run.parameters * run.tokens)
    return replace(run, trunk=run.trunk or f"line {number + 1}", loss=run.loss if run.state == "done" else math.nan)


def _refuse_twice(path: Path, runs: Sequence[Run]) -> None:
    """A name, or a run to the last digit, that is there twice."""
    seen: dict[tuple, int] = {}
    for number, run in enumerate(runs, start=1):
        keys = [("run", run.run, run.kind, run.parameters, run.tokens, run.loss)] if run.counts else []
        for key in [*keys, ("cell", run.cell)] if run.cell else keys:
            if key in seen:
                raise UserError(f"Runs {seen[key]} and {number} of '{path}' are the same {key[0]}; remove one of them.")
            seen[key] = number


def _without_largest(runs: Sequence[Run], count: int) -> list[Run]:
    fitted = sorted((run.loss, number) for number, run in enumerate(runs) if run.fitted)
    if count and not 0 <= count < len(fitted):
        raise UserError(f"--drop-largest-losses is {count}; it must be at least 0 and below the {len(fitted)} runs.")
    out = {number for _, number in fitted[len(fitted) - count :]}
    why = f"among the {count} largest losses"
    return [replace(run, excluded=why) if number in out else run for number, run in enumerate(runs)]
