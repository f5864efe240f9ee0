"""A whole study on a real Slurm, and on this machine, with kills: what comes of it is what came without them."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megahybrid.cli import main
from megahybrid.files import read_json
from megahybrid.launch import slurm
from tests.launch.conftest import ROOT, lab  # noqa: F401
from tests.study.conftest import EXECUTABLE
from tools import workers

FAULTY = ROOT / "tests" / "study" / "faulty.py"
SPOILED = "one-32x1-8e9-s0"  # a trunk
STUDY = (
    "kinds: {one: '(G)*{layers}'}",
    "sizes: [{width: 32, layers: 1}, {width: 32, layers: 2}, {width: 32, layers: 3}]",
    "hold_out: null",
    "overrides: {train.global_batch_size: 2, checkpoint.every: 20}",
)
PATHS = f"{ROOT}:{ROOT / 'kernels'}"
pytestmark = pytest.mark.slow


def command(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "megahybrid", "study", *arguments], env=os.environ | {"PYTHONPATH": PATHS}
    )


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """In Python's place one that spoils a run's weights."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nexec {workers.python()} {FAULTY} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("NAN_IN", SPOILED)
    monkeypatch.setenv("FAULTY", str(python))
    monkeypatch.setattr("megahybrid.study.local.sys.executable", str(python))


def rows() -> list[dict]:
    """runs.csv without what depends on time, and on what is committed meanwhile."""
    changing = "gpu_hours", "began", "code_version"
    assert main(["study", "collect", "study.yaml"]) == 0
    with open("studies/small/runs.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name not in changing} for row in csv.DictReader(file)]


def check(found: list[dict]) -> None:
    """Each run was trained once, each step of it once; the one that was spoiled is named, and its branches with it."""
    runs = {path.parent.name for path in Path("studies/runs").glob("*/metrics.jsonl")}
    assert len(found) == 12 and len(runs) == 10
    for row in (row for row in found if row["run"] in runs):
        metrics = Path("studies/runs", row["run"], "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in metrics]
        assert steps == list(range(steps[0], steps[-1] + 1))
        assert row["state"] != "done" or steps[-1] == int(row["steps"])
    lost = {row["cell"]: row for row in found if row["state"] != "done"}
    assert {row["state"] for row in lost.values()} == {"diverged"} and {row["loss"] for row in lost.values()} == {""}
    assert lost.pop(SPOILED)["excluded"] == "diverged: more than 20 steps in a row were left out"
    assert len(lost) == 2 and all(f"its trunk {SPOILED} has ended" in row["excluded"] for row in lost.values())
    again = {row["cell"]: row for row in found if row["retry_of"]}
    assert set(again) == {f"{name}-half" for name in (SPOILED, *lost)}
    assert all(float(row["loss"]) < 6 for row in again.values())


@pytest.fixture
def reference(make_study, faulty, tmp_path):
    """runs.csv of the study without kills, one run after another."""
    make_study(*STUDY)
    assert main(["study", "launch", "study.yaml"]) == 0
    found = rows()
    check(found)
    Path("studies").rename(tmp_path / "without_kills")
    make_study(*STUDY)
    return found


@pytest.mark.alone
def test_side_by_side_with_kills(reference, monkeypatch):
    chance = random.Random(3)
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        launch = command("launch", "study.yaml", "--jobs", "2")
        time.sleep(chance.uniform(15, 40))
        launch.send_signal(number)
        launch.wait()
    assert main(["study", "launch", "study.yaml", "--jobs", "2"]) == 0
    found = rows()
    check(found)
    assert found == reference


def most_jobs_of_a_run() -> int:
    """Of those that wait or run."""
    active = [job for job in slurm.jobs() if job.state in ("PENDING", "RUNNING")]
    records = [[read_json(path) for path in run.glob("submit/*/job.json")] for run in Path("studies/runs").iterdir()]
    return max(sum(any(job.is_for(facts) for facts in run) for job in active) for run in records)


def test_through_slurm_with_kills(reference, make_study, lab, tmp_path, monkeypatch):  # noqa: F811
    environment = {"NAN_IN": SPOILED, "PYTHONPATH": PATHS}
    (tmp_path / "lab.yaml").write_text(
        f"gpus_per_node: 1\ncpus_per_gpu: 1\ntime: '30'\nsignal_seconds: 60\npython: [{EXECUTABLE}, {FAULTY}]\n"
        f"environment: {json.dumps(environment)}\n"
    )
    make_study(*STUDY, "limits: {profile: lab.yaml}")
    chance = random.Random(4)
    launch = command("launch", "study.yaml")
    time.sleep(chance.uniform(8, 16))
    launch.kill()
    launch.wait()
    monkeypatch.setattr("megahybrid.study.launch._SECONDS_BETWEEN_LOOKS_AT_THE_QUEUE", 2.0)
    for _ in range(3):
        main(["study", "launch", "study.yaml"])
        main(["study", "launch", "study.yaml"])
        assert most_jobs_of_a_run() == 1
        time.sleep(chance.uniform(5, 30))
        running = [job.id for job in slurm.jobs() if job.state == "RUNNING"]
        if running:
            slurm.cancel(chance.choice(running))
    for _ in range(6):
        if main(["study", "launch", "study.yaml", "--wait"]) == 0:
            break
    found = rows()
    check(found)
    assert found == reference
