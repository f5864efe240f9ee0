"""From the plan to the report, over runs whose losses are made up from a law."""

import csv
import functools
import json
from pathlib import Path

import pytest

from megahybrid.cli import main
from megahybrid.study import pictures, prediction
from megahybrid.study.fit import fit
from megahybrid.study.law.law import Law
from megahybrid.study.outcomes import Survey
from tests.study.running import leave

LAWS = {"one": Law(A=40, B=300, E=1.5, alpha=0.3, beta=0.35), "two": Law(A=40, B=210, E=1.5, alpha=0.3, beta=0.35)}
STUDY = (
    "sizes: [{width: 32, layers: 1}, {width: 32, layers: 3}, {width: 64, layers: 2}]",
    "budgets: {flops: [2.0e10, 4.0e10, 8.0e10]}",
    "hold_out: {width: 64, layers: 4, flops: 3.2e11}",
)


def test_verbs_read_what_the_one_before_wrote(make_study, monkeypatch, capsys):
    """Run again, each of them changes nothing."""
    monkeypatch.setattr("megahybrid.launch.runs.shutil.which", lambda name: None)
    monkeypatch.setattr(pictures, "PICTURES", {})
    monkeypatch.setattr(prediction, "fit", functools.partial(fit, replicates=100))
    study, folder = make_study(*STUDY), Path("studies/small")
    assert main(["study", "plan", "study.yaml"]) == 0
    for held_out in (False, True):
        outcomes = Survey(study).look(None)
        for number, cell in enumerate(each.cell for each in outcomes if each.cell.held_out == held_out):
            noise = 1 + 0.0005 * (-1) ** number
            leave(cell, losses=(20.0, float(noise * LAWS[cell.kind].loss(cell.parameters, cell.tokens))))
        if not held_out:
            prediction.freeze(study, Survey(study).look(None))
    for _ in range(2):
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        for verb in (["collect"], ["fit", "--bootstrap", "100"], ["report"]):
            assert main(["study", *verb, "study.yaml"]) == 0
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert {"plan.csv", "prediction.json", "runs.csv", "fit.json", "report.md"} <= before.keys()
    said = before["report.md"].decode()
    assert "**two needs " in said and " % less compute than one for the same loss" in said
    assert "**2 of 2 frozen predictions were right**" in said
    with open(folder / "plan.csv", newline="") as file:
        hours = sum(float(row["gpu_hours"]) for row in csv.DictReader(file))
    assert f" of {hours:.3g} planned" in said
    assert json.loads(before["fit.json"])["kinds"]["one"]["alpha"] == pytest.approx(0.3, abs=0.1)
