"""The table of an experiment's runs in docs/evidence: a row a run, CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from megahybrid.files import write_text
from tools.experiment import Experiment
from tools.experiment_checks import Row

_KEY = ("setting", "arm", "seed", "rate")


def load(path: Path, experiment: Experiment) -> list[Row]:
    """Its rows, none where there is no table; quantities that are not in it are None."""
    if not path.is_file():
        return []
    with path.open() as table:
        return [_read(row, experiment) for row in csv.DictReader(table)]


def merge(path: Path, experiment: Experiment, rows: list[Row]) -> None:
    """Write these rows beside what the table has, in place of older ones of the same runs."""
    merged = {tuple(row[name] for name in _KEY): row for row in (*load(path, experiment), *rows)}
    names = [*_KEY, "steps", "tokens", *experiment.quantities, "code_version"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for key in sorted(merged, key=str):
        writer.writerow({name: "" if merged[key][name] is None else merged[key][name] for name in names})
    write_text(path, text.getvalue())


def _read(row: dict[str, str], experiment: Experiment) -> Row:
    numbers = {name: float(row[name]) if row.get(name) else None for name in (*experiment.quantities, "rate")}
    return {**row, **{name: int(row[name]) for name in ("seed", "steps", "tokens")}, **numbers}
