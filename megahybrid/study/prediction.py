"""prediction.json: what the law says of the runs that are held out, written before they begin and never again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megahybrid import code_version
from megahybrid.errors import UserError
from megahybrid.files import read_json, write_json, write_text
from megahybrid.study.collect import write_runs
from megahybrid.study.file import Study
from megahybrid.study.fit import fit
from megahybrid.study.outcomes import Outcome
from megahybrid.training import attempts
from megahybrid.training.run_directory import RunDirectory

_SAYS = "parameters", "tokens", "flops", "loss", "interval"
"""What of a prediction of fit.json is kept; the rest is about a loss that nobody knows yet."""


def is_frozen(folder: Path, outcomes: Sequence[Outcome]) -> bool:
    """Whether nothing is left to predict: of every run that is held out a prediction stands, or it is too late for
    one. Raises UserError where that cannot be told."""
    return not _to_predict(_frozen(folder), outcomes)


def too_late(folder: Path, outcomes: Sequence[Outcome]) -> list[str]:
    """The held-out cells whose runs, another study's too, had begun before anything was predicted of them."""
    frozen = _frozen(folder)
    return [each.cell.name for each in _unpredicted(frozen, outcomes) if _has_begun(each)]


def freeze(study: Study, outcomes: Sequence[Outcome]) -> None:
    """Fit the law to the runs that are not held out, all of which have ended, and write down what it predicts of the
    held-out ones that have not begun and of which nothing stands yet, by identity. The table that it is fitted to is
    kept beside it, and the runs are named that it lacks.

    Raises NoLaw where it cannot be fitted, and UserError where a file cannot be read, a run has a loss that no law
    gives, or nothing is predicted of one of those that are held out.
    """
    folder = study.folder
    before = _frozen(folder)
    _check_losses(outcomes)
    held_out = _to_predict(before, outcomes)
    runs = write_runs(folder, outcomes)
    fitted = fit(study)
    predictions = {
        each["cell"]: {"kind": kind, **{name: value for name, value in each.items() if name in _SAYS}}
        for kind, law in fitted["kinds"].items()
        for each in law["predictions"]
    }
    if missing := [each.cell.name for each in held_out if each.cell.name not in predictions]:
        raise UserError(f"The fit says nothing of {', '.join(missing)}; see {folder / 'fit.json'}.")
    digest = hashlib.sha256(runs.encode()).hexdigest()
    table = f"predicted-from-{digest[:16]}.csv"
    write_text(folder / table, runs)
    fitted_to = (each for each in outcomes if not each.cell.held_out)
    facts = {
        "frozen": datetime.now(UTC).isoformat(timespec="seconds"),
        "code_version": code_version(),
        "without": [each.cell.name for each in fitted_to if each.state != "done" and each.cell.role != "tune"],
        "table": table,
        "table_sha256": digest,
    }
    made = {each.cell.identity: {"cell": each.cell.name} | predictions[each.cell.name] | facts for each in held_out}
    write_json(folder / "prediction.json", before | made)


def _check_losses(outcomes: Sequence[Outcome]) -> None:
    """Raises UserError where it is the run that is to be mended: the table, which is refused too, is made from it."""
    for each in outcomes:
        if each.state == "done" and each.loss <= 0:
            raise UserError(
                f"{each.cell.name} has ended with loss {each.loss}, and a law is fitted to losses above 0: correct "
                f"it in '{each.run.path / 'metrics.jsonl'}', or remove the run's directory to train it again."
            )


def _to_predict(frozen: Mapping[str, Any], outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [each for each in _unpredicted(frozen, outcomes) if not _has_begun(each)]


def _unpredicted(frozen: Mapping[str, Any], outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those that are held out and of whose very run nothing stands there."""
    return [each for each in outcomes if each.cell.held_out and each.cell.identity not in frozen]


def _has_begun(outcome: Outcome) -> bool:
    """Whether anything of its run may have been seen, in whichever study."""
    if outcome.cell.awaits:  # which run it is, is not known yet
        return False
    if outcome.collected:
        return True
    run = RunDirectory(outcome.run.path)
    return run.metrics.exists() or any(each.get("step") is not None for each in attempts.read(run))


def _frozen(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / "prediction.json"
    if not file.exists():
        return {}
    if (frozen := read_json(file)) is None:
        raise UserError(f"'{file}' cannot be read, and what was predicted is not predicted anew; see to that file.")
    return frozen
