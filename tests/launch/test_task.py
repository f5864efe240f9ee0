"""The tasks of a job without Slurm: two processes in places that the environment gives them."""

import json
import subprocess

import pytest

from tests.launch.conftest import ROOT
from tests.training.conftest import assert_same_run, metrics
from tools.workers import environment, free_port, python


def start(recipe, fault="none -1 -1") -> list[subprocess.Popen]:
    """A job of two tasks on one node; `fault` as tests/launch/faulty.py takes it."""
    command = [python(), str(ROOT / "tests" / "launch" / "faulty.py"), "-m", "megahybrid.launch.task", str(recipe)]
    node = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    places = [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
    return [
        subprocess.Popen(
            command, env=environment(FAULT=fault, **node, **place), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for place in places
    ]


@pytest.fixture
def job(brief_recipe):
    brief_recipe.write_text(brief_recipe.read_text() + "parallel: {tensor: 2, sequence: true}\n")
    return brief_recipe


def test_a_task_that_raises_ends_the_other_and_its_cause_stands_on_top(job, tmp_path, brief_reference):
    for process in start(job, "raise 1 6"):
        assert process.communicate(timeout=90) and process.returncode != 0
    run = tmp_path / "run"
    failure = (run / "logs" / "failure.txt").read_text()
    assert failure.startswith("ValueError: the seventh batch is odd\n") and "rank 1 on " in failure
    assert "in step" in failure  # the traceback
    told = json.loads((run / "status.json").read_text())
    assert (told["state"], told["again"]) == ("failed", False) and "the seventh batch" in told["reason"]
    for process in start(job):
        assert process.communicate(timeout=90) and process.returncode == 0
    assert_same_run(metrics(run), metrics(brief_reference))
