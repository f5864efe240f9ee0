"""kill -9 of one process of a run under torchrun: all end, their logs say why, and the next start goes on."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.training.conftest import assert_same_run, metrics
from tools.workers import environment, python


def launch(recipe: Path) -> subprocess.Popen:
    command = [
        *(python(), "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
        *(
            "-m",
            "megahybrid",
            "train",
            str(recipe),
            "parallel.tensor=2",
            "parallel.sequence=true",
            "checkpoint.every=1",
        ),
    ]
    surroundings = environment(PYTHON_EXEC=python())  # what torchrun starts its processes with
    return subprocess.Popen(command, env=surroundings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def process_of(log: Path) -> int:
    return int(log.read_text().split("process ")[1].split(",")[0])


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_all_processes_end_and_the_next_start_goes_on(victim, brief_recipe, brief_reference, tmp_path):
    run, logs = tmp_path / "run", tmp_path / "run" / "logs"
    job, deadline = launch(brief_recipe), time.monotonic() + 300
    while not (run / "checkpoints" / "latest").exists():
        assert job.poll() is None and time.monotonic() < deadline, job.stderr.read()[-3000:]
        time.sleep(0.02)
    os.kill(process_of(logs / f"rank_0000{victim}.log"), signal.SIGKILL)
    began = time.monotonic()
    job.communicate(timeout=60)
    assert time.monotonic() - began < 60 and job.returncode != 0
    survivor = logs / f"rank_0000{1 - victim}.log"
    assert f"Rank {victim} on " in survivor.read_text() and "died" in survivor.read_text()
    if victim == 1:
        status = json.loads((run / "status.json").read_text())
        assert status["state"] == "failed" and "Rank 1 on " in status["reason"]
    job = launch(brief_recipe)
    assert job.wait(300) == 0, job.stderr.read()[-3000:]
    assert "Going on from" in survivor.read_text()
    assert_same_run(metrics(run), metrics(brief_reference))
