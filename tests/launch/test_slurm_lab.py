"""Jobs on a real Slurm: they train to the end as one process does, whatever happens on the way."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megahybrid import __version__
from megahybrid.cli import main
from megahybrid.launch import runs, slurm
from tests.launch.conftest import ROOT
from tests.training.conftest import assert_same_run, metrics

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


@pytest.fixture
def submit(lab, recipe, tmp_path, capsys):
    """Submits the tiny recipe, with a fault if there is one; returns the jobs' numbers."""

    def submit(*arguments: str, fault: str = "none -1 -1", pause: float = 0, minutes: int = 5) -> list[str]:
        profile = tmp_path / "profile.yaml"
        faulty = ROOT / "tests" / "launch" / "faulty.py"
        environment = {"FAULT": fault, "PAUSE": str(pause), "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        profile.write_text(
            f"gpus_per_node: 2\ncpus_per_gpu: 1\ntime: '{minutes}'\nsignal_seconds: 60\n"
            f"python: [{sys.executable}, {faulty}]\nenvironment: {json.dumps(environment)}\n"
        )
        keys = "checkpoint.every=4", "train.micro_batch_size=2"  # of four processes, too
        assert main(["submit", str(recipe), "--profile", str(profile), *keys, *arguments]) == 0
        said = capsys.readouterr().out
        return re.findall(r"\d+", said.splitlines()[0])

    return submit


def wait(number: str, *states: str, seconds: float = 300) -> str:
    """Wait until a job is in one of the states."""
    deadline, state = time.monotonic() + seconds, ""
    while time.monotonic() < deadline:
        state = next((job.state for job in slurm.jobs() if job.id == number), "")
        if state in states:
            return state
        time.sleep(0.3)
    raise AssertionError(f"job {number} is {state}, not {states}")


def wait_for(path: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.1)


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def output(run: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((run / "logs").glob("slurm_*.out")))


def attempts(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("a_node", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_nodes_train_as_one_process_does(a_node, submit, brief_recipe, brief_reference, tmp_path):
    expected = metrics(brief_reference)  # of the recipe that now stands in place of the one that `submit` has
    steps = len(expected)
    (number,) = submit("--nodes", "2", "--gpus-per-node", str(a_node), "parallel.tensor=2", "checkpoint.every=5")
    assert wait(number, *ENDED) == "COMPLETED", output(tmp_path / "run")
    run = tmp_path / "run"
    assert_same_run(metrics(run), expected)
    (attempt,) = attempts(run)
    assert attempt["job"] == number and attempt["processes"] == 2 * a_node and attempt["nodes"] == "n[1-2]"
    last = 2 * a_node - 1
    assert f"rank {last} of {last + 1}" in (run / "logs" / f"rank_{last:05d}.log").read_text()
    (found,) = runs.find(tmp_path)
    assert (found.state, found.step, found.target, found.jobs) == ("done", steps, steps, (number,))


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_job_with_its_cause_on_top(submit, tmp_path):
    (number,) = submit("--nodes", "2", fault="raise 2 7")
    assert wait(number, *ENDED) == "FAILED"
    run = tmp_path / "run"
    assert time.time() - (run / "logs" / "failure.txt").stat().st_mtime < 30
    failure = (run / "logs" / "failure.txt").read_text()
    assert failure.startswith("ValueError: the seventh batch is odd\n") and "rank 2 on n2" in failure
    assert "in step" in failure  # the traceback
    told = status(run)
    assert (told["state"], told["again"]) == ("failed", False) and "the seventh batch" in told["reason"]
    assert "Failed at step" in output(run) and "the seventh batch is odd" in output(run)
    (found,) = runs.find(tmp_path)
    assert found.state == "failed" and "the seventh batch" in found.reason


@pytest.mark.slow
def test_the_time_limit_saves_requeues_and_goes_on(submit, reference, tmp_path):
    (number,) = submit("--nodes", "2", "checkpoint.every=100", pause=5, minutes=2)
    assert wait(number, "COMPLETED", seconds=700), output(tmp_path / "run")
    starts = attempts(tmp_path / "run")
    assert len(starts) > 1 and {start["job"] for start in starts} == {number} and starts[1]["step"] > 0
    assert "Stopped by SIGUSR1" in output(tmp_path / "run")
    assert_same_run(metrics(tmp_path / "run"), metrics(reference))


@pytest.mark.slow
def test_a_node_that_dies_is_replaced(submit, lab, reference, tmp_path):
    (number,) = submit("--nodes", "2", pause=1)
    wait_for(tmp_path / "run" / "checkpoints" / "latest")
    victim = subprocess.run(["squeue", "-h", "-j", number, "-o", "%N"], capture_output=True, text=True).stdout.strip()
    node = subprocess.run(["scontrol", "show", "hostnames", victim], capture_output=True, text=True).stdout.split()[1]
    tool = [sys.executable, str(ROOT / "tools" / "slurm_lab")]
    subprocess.run([*tool, "kill", str(lab), node], check=True)
    try:
        wait(number, "COMPLETED", seconds=240)
    finally:
        subprocess.run([*tool, "revive", str(lab), node], check=True)
    starts = attempts(tmp_path / "run")
    assert len(starts) == 2 and starts[1]["step"] >= 4
    assert_same_run(metrics(tmp_path / "run"), metrics(reference))


@pytest.mark.slow
def test_a_hang_ends_with_stacks_and_goes_on(submit, reference, tmp_path):
    (number,) = submit("--nodes", "2", "train.watch.step_seconds=6", fault="hang 1 7")
    wait(number, "COMPLETED", seconds=180)
    run = tmp_path / "run"
    failure = (run / "logs" / "failures" / f"{number}-0.txt").read_text()
    assert failure.startswith("No progress for ")
    (stuck,) = [line for line in failure.splitlines() if line.startswith("rank 1 on n1:")]
    assert "faulty.py" in stuck and "step 6" in stuck
    for rank in range(4):
        assert "most recent call first" in (run / "logs" / f"rank_{rank:05d}.log").read_text()
    assert [start["step"] for start in attempts(run)] == [0, 4]
    assert_same_run(metrics(run), metrics(reference))


@pytest.mark.slow
def test_a_process_killed_in_start_up_is_named_and_the_job_goes_on(submit, reference, tmp_path):
    (number,) = submit("--nodes", "2", fault="kill 3 0")
    wait(number, "COMPLETED", seconds=180)
    run = tmp_path / "run"
    (record,) = (run / "logs" / "failures").iterdir()
    assert record.name == f"{number}-0.txt" and record.read_text().startswith("Rank 3 on n2 died")
    assert [start["step"] for start in attempts(run)] == [0, 0]
    assert_same_run(metrics(run), metrics(reference))


@pytest.mark.slow
def test_a_machine_that_breaks_again_and_again_is_given_up(submit, tmp_path):
    (number,) = submit("train.watch.restarts=1", fault="break 1 7")
    assert wait(number, "FAILED", seconds=240)
    run = tmp_path / "run"
    assert [start["step"] for start in attempts(run)] == [0, 4, 4]
    for told in (status(run)["reason"], (run / "logs" / "failure.txt").read_text().splitlines()[0]):
        assert "started 2 times from step 4" in told and "fell off the bus in start 2" in told
    assert (status(run)["state"], status(run)["again"], status(run)["restart"]) == ("failed", False, 3)
    assert "Failed at step" in output(run)


@pytest.mark.slow
def test_a_chain_goes_on_job_by_job(submit, reference, tmp_path):
    numbers = submit("--chain", "3", "checkpoint.every=100", pause=0.5)
    assert len(numbers) == 3
    run = tmp_path / "run"
    for number in numbers[:2]:
        before = status(run)["step"] if (run / "status.json").exists() else 0
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() or len(metrics(run)) < before + 3:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        subprocess.run(["scancel", "--signal=USR1", number], check=True)
        assert wait(number, *ENDED) == "COMPLETED"
    assert wait(numbers[2], *ENDED) == "COMPLETED"
    assert [start["job"] for start in attempts(run)] == numbers
    assert_same_run(metrics(run), metrics(reference))


@pytest.mark.slow
def test_a_job_runs_the_code_that_was_submitted(lab, brief_recipe, brief_reference, tmp_path):
    """A checkout that breaks while the job is held in the queue."""
    checkout, run = tmp_path / "checkout", tmp_path / "run"
    for name in ("megahybrid", "kernels", "slurm"):
        shutil.copytree(ROOT / name, checkout / name)
    (tmp_path / "profile.yaml").write_text("gpus_per_node: 1\ncpus_per_gpu: 1\ntime: '5'\nsbatch: [--hold]\n")
    command = [sys.executable, "-m", "megahybrid", "submit", brief_recipe, "--profile", tmp_path / "profile.yaml"]
    environment = {**os.environ, "PYTHONPATH": f"{checkout}:{checkout / 'kernels'}"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (number,) = re.findall(r"\d+", done.stdout.splitlines()[0])
    for file in ("megahybrid/launch/task.py", "megahybrid/launch/verdict.py", "megahybrid/training/loop.py"):
        (checkout / file).write_text("raise RuntimeError('of another version')")
    subprocess.run(["scontrol", "release", number], check=True)
    assert wait(number, *ENDED, seconds=300) == "COMPLETED", output(run)
    assert_same_run(metrics(run), metrics(brief_reference))
    (facts,) = run.glob("submit/*/job.json")
    last = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    # The version of a folder that is no checkout of git.
    assert json.loads(facts.read_text())["code_version"] == __version__
    assert json.loads((last / "checkpoint.json").read_text())["megahybrid"] == __version__


@pytest.mark.slow
def test_a_finished_run_ends_its_chain(submit, tmp_path):
    numbers = submit("--chain", "3")
    assert wait(numbers[0], *ENDED) == "COMPLETED"
    assert {wait(number, *ENDED) for number in numbers[1:]} == {"CANCELLED"}


@pytest.mark.slow
def test_an_array_trains_a_run_for_each_value(submit, tmp_path):
    (number,) = submit("--array", "optimizer.learning_rate=0.005,0.004,0.003")
    run = tmp_path / "run"
    for value in ("0.005", "0.004", "0.003"):
        deadline = time.monotonic() + 150
        folder = run / f"learning_rate={value}"
        while not (folder / "status.json").exists() or status(folder)["state"] != "done":
            assert time.monotonic() < deadline, output(run)
            time.sleep(0.3)
        assert metrics(folder)[-1]["learning_rate"] == pytest.approx(0.1 * float(value), rel=1e-3)
    assert [each.state for each in runs.find(run)] == ["done"] * 3
    assert number


@pytest.mark.slow
def test_a_cancelled_job_saves_and_stays_cancelled(submit, reference, tmp_path):
    (number,) = submit("checkpoint.every=100", pause=0.5)
    run = tmp_path / "run"
    wait_for(run / "metrics.jsonl")
    subprocess.run(["scancel", number], check=True)
    assert wait(number, *ENDED, "PENDING") == "CANCELLED"
    assert (status(run)["state"], status(run)["reason"]) == ("stopped", "SIGTERM")
    (number,) = submit("checkpoint.every=100")
    assert wait(number, *ENDED) == "COMPLETED"
    assert attempts(run)[-1]["step"] > 0
    assert_same_run(metrics(run), metrics(reference))


@pytest.mark.slow
def test_two_jobs_at_once_do_not_touch_each_other(submit, reference, tmp_path):
    numbers = [submit(f"run.dir={tmp_path / name}", pause=0.3)[0] for name in ("run", "other")]
    for number in numbers:
        assert wait(number, *ENDED) == "COMPLETED"
    for name in ("run", "other"):
        assert_same_run(metrics(tmp_path / name), metrics(reference))


@pytest.mark.slow
def test_a_run_that_is_in_the_queue_is_not_submitted_again(submit, recipe, tmp_path, capsys):
    (number,) = submit(pause=1)
    assert main(["submit", str(recipe), "--profile", str(tmp_path / "profile.yaml")]) == 2
    assert f"Job {number} trains" in capsys.readouterr().err
    subprocess.run(["scancel", number], check=True)
