"""GPU hours from a run's metrics, and from steps on this machine."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megahybrid.cli import main
from megahybrid.config import load_config
from megahybrid.scaling.flops import flops_per_token
from megahybrid.scaling.hours import by_utilisation
from megahybrid.training import measuring
from megahybrid.training.measuring import measured, probe
from tools.workers import python

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["model.pattern=GG", "model.hidden_size=32", "train.seq_length=64", "train.micro_batch_size=1"]


def test_a_plan_says_hours_and_whose(tmp_path, capsys):
    recipe = str(RECIPES / "lalte-0.4b.yaml")
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": step, "mfu": 0.01 if step <= 10 else 0.3 + step / 1000} for step in range(1, 32)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')
    assert main(["plan", recipe, "--like", str(run), "train.branch_from=runs/trunk@16384"]) == 0
    said = capsys.readouterr().out
    hours = by_utilisation(load_config(recipe), 0.321, "").hours / 5
    assert f"GPU hours on one H100: {hours:.3g}, " in said and f"(from 32.1 % MFU, median of 21 steps of {run})" in said
    assert "4,096 steps of 524,288 tokens after the trunk's 16,384: 2,147,483,648 tokens" in said
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:10]))
    assert main(["plan", recipe, "--like", str(run)]) == 2
    assert "has no mfu after step 10; give a run that has trained longer, on a known GPU" in capsys.readouterr().err
    assert main(["plan", recipe, "--like", str(tmp_path)]) == 2
    assert "give the directory of a run that has trained" in capsys.readouterr().err


def test_a_probe_trains_here_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", python())
    monkeypatch.chdir(tmp_path)
    keys = [*SMALL, "parallel.pipeline=2", "model.pattern=G|G", "train.global_batch_size=2", "model.vocab_size=512"]
    found = probe(load_config(RECIPES / "quickstart.yaml", keys))
    assert 0.001 < found.step_seconds < 10 and (found.gpu, found.steps) == ("CPU", 650)
    assert list(tmp_path.iterdir()) == []


def test_a_probe_of_many_micro_batches_runs_a_few(monkeypatch):
    """The median of ten steps after three, times as many as it leaves out; what fails is one sentence."""
    seen, seconds = [], [9.0, 9.0, 9.0, *(0.1 * each for each in range(1, 11))]
    result = SimpleNamespace(returncode=0, stdout=f"noise\n{json.dumps({'device': 'H100', 'seconds': seconds})}\n")

    def run(command, **others):
        seen.append(load_config(command[-2]))
        return result

    monkeypatch.setattr(measuring.subprocess, "run", run)
    config = load_config(RECIPES / "quickstart.yaml", [*SMALL, "train.global_batch_size=24"])
    assert probe(config).step_seconds == pytest.approx(3 * 0.55)
    assert (seen[0].train.global_batch_size, seen[0].model) == (8, config.model)
    result.returncode, result.stderr = 1, "some\nThe GPU has too little memory.\n"
    with pytest.raises(
        measuring.UserError, match=r"^A probe of 'runs/quickstart' failed: The GPU has too little memory.$"
    ):
        probe(config)


def test_a_run_that_is_measured_is_like_itself(tmp_path):
    """At the MFU that its steps' seconds make, its plan has these seconds."""
    config = load_config(RECIPES / "gdn-1.4b.yaml")
    tokens = config.train.global_batch_size * config.train.seq_length
    mfu = tokens / 20.0 * flops_per_token(config).training / 989e12
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 20, "mfu": mfu}) + "\n")
    assert measured(config, tmp_path).step_seconds == pytest.approx(20.0)
