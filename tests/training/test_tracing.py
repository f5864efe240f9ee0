"""Traces of single steps."""

import gzip
import json

from megahybrid.cli import main
from tests.training.conftest import metrics


def test_a_trace_of_a_step_is_written_and_changes_nothing(brief_recipe, brief_reference, tmp_path, capsys):
    assert main(["train", str(brief_recipe), "train.trace.steps=[2,3]"]) == 0
    assert metrics(tmp_path / "run") == metrics(brief_reference)
    traces = tmp_path / "run" / "traces"
    names = [f"step_0000000{step}-rank_0.json.gz" for step in (2, 3)]
    assert sorted(path.name for path in traces.iterdir()) == names
    printed = capsys.readouterr().out
    for step, name in zip((2, 3), names, strict=True):
        with gzip.open(traces / name, "rt") as file:
            found = {event["name"] for event in json.load(file)["traceEvents"]}
        assert any("mm" in each for each in found) and any("Backward" in each for each in found)
        assert f"A trace of step {step}: {traces / name}" in printed


def test_a_trace_that_cannot_be_written_does_not_end_the_run(brief_recipe, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "traces").write_text("in its place")
    assert main(["train", str(brief_recipe), "train.steps=3", "train.trace.steps=[2]"]) == 0
    assert "The trace of step 2 could not be written" in capsys.readouterr().out
    assert len(metrics(tmp_path / "run")) == 3


def test_what_will_never_be_traced_is_refused(brief_recipe, tmp_path, capsys):
    assert main(["train", str(brief_recipe), "train.trace.steps=[2]", "train.trace.ranks=[0,1]"]) == 2
    assert "train.trace.ranks has 1, but processes are 0 to 0; change it" in capsys.readouterr().err
    assert main(["train", str(brief_recipe), "train.trace.steps=[2,2000]"]) == 2
    assert "train.trace.steps has 2000, which a run of train.steps =" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
