"""kill -9 at random moments, saves included: the losses are those of an uninterrupted run, bit for bit."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.conftest import metrics
from tools.workers import environment, python


def start(recipe: Path, program: str | None = None) -> subprocess.Popen:
    command = [program or python(), "-m", "megahybrid", "train", str(recipe), "checkpoint.every=1"]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill_somewhere(recipe: Path, run: Path, draw: random.Random) -> bool:
    """Start the run and kill it some steps on (there is a save after each); False when it got to its end before."""
    process, before = start(recipe), lines(run)
    steps, wait = draw.randint(1, 3), draw.uniform(0, 0.3)
    while process.poll() is None and not before <= lines(run) - steps:
        time.sleep(0.005)
    time.sleep(wait)
    if process.poll() is not None:
        assert process.returncode == 0, process.stderr.read()[-2000:]
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


def kill_times(count: int, recipe: Path, run: Path, seed: int) -> int:
    draw, kills = random.Random(seed), 0
    while kills < count and kill_somewhere(recipe, run, draw):
        kills += 1
    last = start(recipe)
    assert last.wait(120) == 0, last.stderr.read()[-2000:]
    return kills


def test_two_kills(recipe, reference, tmp_path):
    assert kill_times(2, recipe, tmp_path / "run", seed=1) == 2
    assert metrics(tmp_path / "run") == metrics(reference)


@pytest.mark.slow
def test_twenty_kills(recipe, reference, tmp_path):
    """Over as many runs as it takes, since one has only twenty steps."""
    kills, seed = 0, 0
    while kills < 20:
        seed += 1
        path = tmp_path / f"recipe_{seed}.yaml"
        path.write_text(recipe.read_text().replace(str(tmp_path / "run"), str(tmp_path / f"run_{seed}")))
        kills += kill_times(20 - kills, path, tmp_path / f"run_{seed}", seed)
        assert metrics(tmp_path / f"run_{seed}") == metrics(reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end_saves_and_exits_cleanly(number, recipe, reference, tmp_path):
    import json

    process, run = start(recipe, sys.executable), tmp_path / "run"  # the way users start one process, from nothing
    while process.poll() is None and lines(run) < 3:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == 0, process.stderr.read()[-2000:]
    assert ("Interrupted: it ends this step and saves" in process.stderr.read()) == (number == signal.SIGINT)
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", number.name)
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{status['step']:08d}"
    assert start(recipe).wait(120) == 0
    assert metrics(run) == metrics(reference)
