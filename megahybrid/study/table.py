"""Runs as a CSV file has them: a study's runs.csv, or another's table."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megahybrid.errors import UserError
from megahybrid.study.law.law import Array

Texts = NDArray[np.str_]
_TEXTS = ("cell", "run", "kind", "trunk", "held_out", "retry_of", "state", "excluded")
_NUMBERS = ("parameters", "parameters_without_embedding", "tokens", "flops", "loss")
COLUMNS = _TEXTS + _NUMBERS
"""That are read; `parameters`, `loss` and one of `tokens` and `flops` must be there."""


@dataclass(frozen=True)
class Table:
    """Columns of a table of runs, each [runs].

    Attributes:
        cell: names; empty where the table has none.
        run: identities; likewise.
        kind: "all" where the table has none.
        trunk: what runs share noise by; a run's own where the table has none.
        held_out: whether no fit may see it.
        retry_of: the identity of the run in whose place it was trained, or empty.
        state: "done" where the table has none.
        excluded: why no fit may see it, or empty.
        parameters, tokens, flops: where one of the last two is missing, flops = 6 · parameters · tokens.
        parameters_without_embedding: None where the table has none.
        loss: nats a token; nan for runs that are not done.
    """

    cell: Texts
    run: Texts
    kind: Texts
    trunk: Texts
    held_out: NDArray[np.bool_]
    retry_of: Texts
    state: Texts
    excluded: Texts
    parameters: Array
    parameters_without_embedding: Array | None
    tokens: Array
    flops: Array
    loss: Array

    @property
    def done(self) -> NDArray[np.bool_]:
        """Whose losses count."""
        return (self.state == "done") & (self.excluded == "")

    @property
    def fitted(self) -> NDArray[np.bool_]:
        """What a law is fitted to."""
        return self.done & ~self.held_out


def parse_columns(text: str) -> dict[str, str]:
    """`parameters=Model Size,loss=loss` as a dictionary. Raises UserError."""
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    names = {ours.strip(): theirs.strip() for ours, theirs in pairs}
    wrong = [ours for ours, theirs in names.items() if ours not in COLUMNS or not theirs]
    if wrong or len(names) < len(pairs):
        which = f"has '{wrong[0]}'" if wrong else "names a column twice"
        raise UserError(f"--columns {which}; give pairs NAME=COLUMN with each NAME once, one of {', '.join(COLUMNS)}.")
    return names


def read_table(path: Path, columns: Mapping[str, str] | None = None, drop_largest_losses: int = 0) -> Table:
    """Read a table.

    Args:
        path: a CSV file with a line of names.
        columns: the file's names of our columns; other columns are not read. Ours themselves when left out.
        drop_largest_losses: how many runs to exclude for it.

    Raises UserError for a file that cannot be read, a missing column, a number that is none, or is not finite and
    above 0, a run that is there twice, and more runs to drop than there are.
    """
    rows = _rows(path)
    names = dict(columns) if columns else {name: name for name in COLUMNS if name in rows[0]}
    _check_names(path, names, rows[0])
    texts = {name: np.array([(row[names[name]] or "").strip() for row in rows]) for name in _TEXTS if name in names}
    empty = np.full(len(rows), "", dtype=object)
    state = texts.get("state", np.full(len(rows), "done"))
    numbers = {name: _numbers(path, names[name], rows, name, state) for name in _NUMBERS if name in names}
    numbers.setdefault("tokens", numbers.get("flops", np.nan) / (6 * numbers["parameters"]))
    numbers.setdefault("flops", 6 * numbers["parameters"] * numbers["tokens"])
    trunk = texts.get("trunk", empty)
    own = np.array([f"line {line}" for line in range(2, len(rows) + 2)])
    table = Table(
        texts.get("cell", empty),
        texts.get("run", empty),
        texts.get("kind", np.full(len(rows), "all")),
        np.where(trunk == "", own, trunk),
        _flags(path, names, texts.get("held_out", np.full(len(rows), "0"))),
        texts.get("retry_of", empty),
        state,
        texts.get("excluded", empty).astype(object),
        **{name: numbers.get(name) for name in _NUMBERS},
    )
    _refuse_twice(path, table)
    _drop_largest(table, drop_largest_losses)
    return table


def _rows(path: Path) -> list[dict[str, str]]:
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


def _check_names(path: Path, names: Mapping[str, str], row: Mapping[str, str]) -> None:
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


def _numbers(path: Path, column: str, rows: list[dict[str, str]], name: str, state: Texts) -> Array:
    """A column of positive numbers; a run that is not done needs no loss."""
    found = np.empty(len(rows))
    for place, row in enumerate(rows):
        text = row[column].strip()
        if name == "loss" and state[place] != "done":
            found[place] = np.nan
            continue
        try:
            found[place] = float(text)
        except ValueError:
            found[place] = np.nan
        if not (math.isfinite(found[place]) and found[place] > 0):
            raise UserError(
                f"Run {place + 1} of '{path}' has {column} = '{text}'; it must be a finite number above 0: correct it, "
                "or leave the run out."
            )
    return found


def _flags(path: Path, names: Mapping[str, str], values: Texts) -> NDArray[np.bool_]:
    for place, value in enumerate(values):
        if value not in ("0", "1"):
            raise UserError(f"Run {place + 1} of '{path}' has {names['held_out']} = '{value}'; it must be 0 or 1.")
    return values == "1"


def _refuse_twice(path: Path, table: Table) -> None:
    """A name, or a run to the last digit, that is there twice."""
    seen: dict[tuple, int] = {}
    for place in range(len(table.loss)):
        run = (table.kind[place], table.parameters[place], table.tokens[place], table.loss[place])
        keys = [("run", *run)] if table.done[place] else []
        if table.cell[place]:
            keys.append(("cell", table.cell[place]))
        for key in keys:
            if key in seen:
                raise UserError(
                    f"Runs {seen[key] + 1} and {place + 1} of '{path}' are the same {key[0]}; remove one of them."
                )
            seen[key] = place


def _drop_largest(table: Table, count: int) -> None:
    fitted = np.flatnonzero(table.fitted)
    if not 0 <= count < len(fitted):
        raise UserError(f"--drop-largest-losses is {count}; it must be at least 0 and below the {len(fitted)} runs.")
    largest = fitted[np.argsort(table.loss[fitted], kind="stable")[len(fitted) - count :]]
    table.excluded[largest] = f"among the {count} largest losses"
