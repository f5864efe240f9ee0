import json
import sys
from pathlib import Path

import pytest

from megahybrid.study import launch as launching
from megahybrid.study.file import load_study
from tests.study.running import FILE, PYTHON
from tests.training.conftest import RECIPE, prepared, text  # noqa: F401

EXECUTABLE = sys.executable


@pytest.fixture
def make_study(tmp_path, monkeypatch, text, prepared):  # noqa: F811
    """Makes the study, with lines that replace its file's of the same key, in the working directory: study.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(run="run", data=prepared, text=text))

    def make(*lines: str):
        kept = [line for line in FILE.splitlines() if line]
        for line in lines:
            kept = [each for each in kept if each.split(":")[0] != line.split(":")[0]] + [line]
        for file in (Path("study.yaml"), Path("studies/small/study.yaml")):  # planned
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(kept))
        return load_study("study.yaml")

    return make


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """In Python's place a program that makes runs up, of so many seconds; its calls are read by `calls`."""

    def make(seconds: float = 0.3, **faults: str):
        python = tmp_path / "python"
        python.write_text(PYTHON.format(python=EXECUTABLE, seconds=seconds))
        python.chmod(0o755)
        (tmp_path / "faults.json").write_text(
            json.dumps({name.replace("_", "-"): what for name, what in faults.items()})
        )
        monkeypatch.setattr("megahybrid.study.local.sys.executable", str(python))
        monkeypatch.setattr("megahybrid.launch.pinned.pin", lambda folder: folder.mkdir(parents=True))

    return make


@pytest.fixture
def small(monkeypatch):
    """Another test's lab is not asked, nothing is waited for that takes seconds, and studies may be too small."""
    monkeypatch.setattr(launching, "expect", lambda study, cells: None)
    monkeypatch.setattr("megahybrid.launch.runs.shutil.which", lambda name: None)
    monkeypatch.setattr(launching, "_SECONDS_BETWEEN_LOOKS", 0.05)
    monkeypatch.setattr(launching, "_SECONDS_BETWEEN_LOOKS_AT_THE_QUEUE", 0.05)


@pytest.fixture
def fit(monkeypatch):
    """A law that predicts 2.5 of every run that is held out."""

    def fit(study):
        held_out = [line.split(",") for line in (study.folder / "runs.csv").read_text().splitlines() if ",1,," in line]
        return {
            "kinds": {
                kind: {
                    "predictions": [
                        {"cell": row[0], "loss": 2.5, "interval": [2.4, 2.6]} for row in held_out if row[2] == kind
                    ]
                }
                for kind in ("one", "two")
            }
        }

    monkeypatch.setattr("megahybrid.study.prediction.fit", fit)
