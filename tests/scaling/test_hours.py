"""GPU hours beside what was measured: the figures of docs/performance, a run's metrics, and steps on this machine."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megahybrid.cli import main
from megahybrid.config import load_config
from megahybrid.scaling.flops import flops_per_token
from megahybrid.scaling.hours import by_utilisation, tabled
from megahybrid.training import measuring
from megahybrid.training.measuring import measured, probe
from tools.workers import python

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
WHOLE_STEP = (ROOT / "docs/performance/whole-step.md").read_text()
SMALL = ["model.pattern=GG", "model.hidden_size=32", "train.seq_length=64", "train.micro_batch_size=1"]


def rows():
    """Recipe, tokens a sample, micro-batch, samples and tokens/s of the table of whole steps."""
    for cells in re.findall(r"^\| `(\S+)` \| ([\d,]+) \| (\d+), (\d+) \| ([\d,]+) \|", WHOLE_STEP, re.MULTILINE):
        yield cells[0], *(int(each.replace(",", "")) for each in cells[1:])


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0]}-{row[1]}")
def test_the_table_gives_the_steps_that_were_measured(row):
    """But for full attention over long samples, whose kernel computes at another rate."""
    name, length, micro, samples, speed = row
    if (name.startswith("transformer"), length) == (True, 65536):
        pytest.skip("slower than the table says")
    long = ["train.recompute=all"] if length == 65536 else []
    keys = [f"train.seq_length={length}", f"train.micro_batch_size={micro}", f"train.global_batch_size={samples}"]
    found = tabled(load_config(RECIPES / f"{name}.yaml", [*keys, *long]))
    assert found.step_seconds == pytest.approx(samples * length / speed, rel=0.04)
    assert "MFU" in found.source and found.gpu == "H100"


def test_launches_give_the_steps_that_were_measured():
    """0.069 s of the quickstart, 0.422 s of four micro-batches of one sample; docs/performance."""
    quickstart = load_config(RECIPES / "quickstart.yaml")
    found = tabled(quickstart)
    assert found.step_seconds == pytest.approx(0.069, rel=0.02) and "launches" in found.source
    assert found.hours == pytest.approx(650 * found.step_seconds / 3600)
    keys = ["train.micro_batch_size=1", "train.global_batch_size=4"]
    assert tabled(load_config(RECIPES / "lalte-0.4b.yaml", keys)).step_seconds == pytest.approx(0.422, rel=0.02)


def test_hours_are_flops_by_peak_and_utilisation():
    config = load_config(RECIPES / "lalte-0.4b.yaml")
    flops = flops_per_token(config).training * 20480 * 2**19
    assert by_utilisation(config, 0.4, "").hours == pytest.approx(flops / (989e12 * 0.4) / 3600)
    assert by_utilisation(config, 0.4, "", "A100").hours == pytest.approx(flops / (312e12 * 0.4) / 3600)
    config.train.branch_from = "runs/trunk@16384"
    assert by_utilisation(config, 0.4, "").hours == pytest.approx(flops / (989e12 * 0.4) / 3600 / 5)


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
