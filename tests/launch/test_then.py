"""What follows a run that is done: by itself, and on a real Slurm with kills in between."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from megahybrid import cli
from megahybrid.errors import MachineFault, UserError
from megahybrid.hf.staging import staged
from megahybrid.launch import runs, slurm, then
from megahybrid.launch.task import GO_ON
from megahybrid.training import checkpoint_folder
from tests.launch.conftest import ROOT
from tests.launch.test_slurm_lab import ENDED, attempts, status, submit, wait, wait_for  # noqa: F401

LAST = "step_00000020"
PROGRAM = """#!/bin/bash
echo "${*:3}" >>calls.txt
case $* in
    *killed*) kill -KILL $$ ;;
    *wrong*) exit 2 ;;
    *faulty*) exit 75 ;;
    *long*) trap 'echo tidied >>calls.txt; exit 130' TERM; for _ in {1..100}; do sleep 0.1; done ;;
esac
"""


def test_without_submitting_the_script_of_what_follows_is_shown_too(recipe, tmp_path, capsys):
    (tmp_path / "cluster.yaml").write_text("python: [apptainer, exec, image.sif, python]\n")  # which may have lm_eval
    then = "--then", "export", "--then", "harness --tasks arc_easy"
    command = "submit", str(recipe), "--gpus-per-node", "2", "--profile", str(tmp_path / "cluster.yaml"), *then
    assert cli.main([*command, "--dry-run"]) == 0
    training, follows = capsys.readouterr().out.split("# --- then.sbatch ---\n")
    assert training.startswith("# --- job.sbatch ---\n#!") and "THEN=" not in training
    assert "THEN=(export 'harness --tasks arc_easy')" in follows.splitlines() and "-m megahybrid.launch.then" in follows
    for script in (training, follows):
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.fixture
def done(recipe, tmp_path, monkeypatch):
    """Goes through steps after a run that has come to a step of 20; returns the exit code and the commands given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program").write_text(PROGRAM)
    (tmp_path / "program").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "program"))

    def done(*steps, at=20):
        checkpoint = tmp_path / "run" / "checkpoints" / checkpoint_folder.name(at)
        checkpoint.mkdir(parents=True)
        (checkpoint / "checkpoint.json").touch()
        code = then.main(str(recipe), steps)
        calls = tmp_path / "calls.txt"
        return code, calls.read_text().splitlines() if calls.exists() else []

    return done


def test_a_run_that_is_not_done_is_followed_by_nothing(done, capsys):
    assert done("export", at=15) == (1, [])
    assert "is at step 15 of 20" in capsys.readouterr().out


def test_every_step_comes_whatever_became_of_the_one_before(done, tmp_path):
    run = tmp_path / "run"
    expected = [f"eval {run} --task 'wrong one'".replace("'", ""), f"export {run} {run}/exports/{LAST} --dtype fp32"]
    assert done("eval --task 'wrong one'", "export --dtype fp32") == (1, expected)


def test_an_export_that_was_killed_leaves_nothing_once_it_comes_again(tmp_path, monkeypatch):
    """And what another one writes there stays."""
    monkeypatch.setenv("MEGAHYBRID_SUBMISSION", "mine-then")
    for owner in ("mine-then", "17"):
        (tmp_path / f".{LAST}.{owner}.part" / "left").mkdir(parents=True)
    with staged(tmp_path / LAST) as part:
        (part / "config.json").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{LAST}.17.part", LAST]
    assert [path.name for path in (tmp_path / LAST).iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "there, arguments, stays",
    [
        ({"config.json": '{"dtype": "bfloat16"}'}, "", True),
        ({"config.json": '{"dtype": "bfloat16"}', "README.md": "---\nlicense: mit\n---\n"}, " --license=mit", True),
        ({"config.json": '{"dtype": "bfloat16"}', "README.md": "---\nlicense: mit\n---\n"}, " --license isc", False),
        ({"config.json": '{"dtype": "bfloat16"}'}, " --license mit --no-verify", False),
        ({"config.json": '{"dtype": "bfloat16"}'}, " --dtype fp32", False),
        ({"config.json": '{"dtype": "float32"}'}, "", False),
        ({"README.md": "mine"}, "", False),
        ({}, "", False),
    ],
)
def test_an_export_that_is_there_stays(done, tmp_path, there, arguments, stays):
    """Where it is what was asked for; else `export` refuses its folder."""
    target = tmp_path / "run" / "exports" / LAST
    target.mkdir(parents=True)
    for name, text in there.items():
        (target / name).write_text(text)
    assert done(f"export{arguments}") == (0, [] if stays else [f"export {tmp_path}/run {target}{arguments}"])


def test_a_step_that_is_killed_is_told_from_one_that_fails(done, tmp_path):
    assert done("eval --task killed", "export") == (128 + signal.SIGKILL, [f"eval {tmp_path}/run --task killed"])


def test_a_machines_fault_in_a_step_is_told_from_its_failure(done, tmp_path):
    assert done("eval --task faulty", "export") == (then.FAULT, [f"eval {tmp_path}/run --task faulty"])


@pytest.mark.parametrize("fault, code", [(MachineFault("No disk."), GO_ON), (UserError("No."), 2)])
def test_the_command_line_tells_them_apart(monkeypatch, fault, code):
    def fails(_):
        raise fault

    monkeypatch.setattr(cli, "_export", fails)
    assert cli.main(["export", "run", "target"]) == code


@pytest.mark.parametrize("fault", [MachineFault("No disk."), UserError("No.")])
def test_a_run_that_cannot_be_read(done, monkeypatch, fault):
    def fails(*_):
        raise fault

    monkeypatch.setattr(then, "load_config", fails)
    assert done("export") == (then.FAULT if isinstance(fault, MachineFault) else 1, [])


@pytest.mark.parametrize(
    "code, restarts, again",
    [(75, 9, True), (then.FAULT, 2, True), (then.FAULT, 3, False), (137, 2, True), (137, 3, False), (1, 0, False)],
)
def test_which_ends_put_the_job_back_into_the_queue(tmp_path, code, restarts, again):
    for name, body in (("srun", f"exit {code}"), ("scontrol", f'echo "$*" >{tmp_path}/said')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "SLURM_JOB_NODELIST": "a"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    job = subprocess.run(["bash", ROOT / "slurm" / "then.sbatch"], env={"PATH": path, **variables})
    assert job.returncode == (0 if again else code)
    assert (tmp_path / "said").exists() == again


def test_a_warning_ends_the_step_and_is_no_end(done, tmp_path):
    def warn():
        wait_for(tmp_path / "calls.txt")
        time.sleep(0.3)  # until its trap is set
        signal.raise_signal(signal.SIGUSR1)

    threading.Thread(target=warn).start()
    assert done("eval --task long", "export") == (GO_ON, [f"eval {tmp_path}/run --task long", "tidied"])


def following() -> str:
    """The number of the job that follows, of those that the lab has had the newest."""
    return max((job.id for job in slurm.jobs() if job.comment.endswith("-then")), key=int)


def restarts(number: str) -> int:
    return next(job.restarts for job in slurm.jobs() if job.id == number)


@pytest.mark.slow
def test_evaluated_and_exported_whatever_is_killed_on_the_way(submit, lab, tmp_path):  # noqa: F811
    evaluation = "eval --task selective_mqar --set pairs=3 --lengths 64,256 --samples 1500"
    (number,) = submit("--then", evaluation, "--then", "export --dtype fp32", fault="kill 1 0")
    job, run, tool = following(), tmp_path / "run", [sys.executable, str(ROOT / "tools" / "slurm_lab")]
    assert wait(number, *ENDED, seconds=240) == "COMPLETED" and len(attempts(run)) == 2
    lines = run / "evaluations" / LAST / "selective_mqar.jsonl"
    wait_for(lines, seconds=200)
    node = subprocess.run(["squeue", "-h", "-j", job, "-o", "%N"], capture_output=True, text=True).stdout.strip()
    subprocess.run([*tool, "kill", str(lab), node], check=True)
    before = len(lines.read_text().splitlines())
    try:
        deadline = time.monotonic() + 240
        while len(lines.read_text().splitlines()) <= before:  # it went on elsewhere
            assert time.monotonic() < deadline
            time.sleep(0.3)
    finally:
        subprocess.run([*tool, "revive", str(lab), node], check=True)
    assert restarts(job) == 1 and not (run / "exports").exists()
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)  # as before the time limit
    wait(job, "PENDING")
    assert wait(job, *ENDED, seconds=400) == "COMPLETED"
    said = (run / "logs" / f"then_{job}.out").read_text()
    assert restarts(job) == 2, said
    keys = [(each["length"], each["index"]) for each in map(json.loads, lines.read_text().splitlines())]
    assert len(keys) == len(set(keys)) == 2 * 1500
    entries = json.loads((lines.parent / "results.json").read_text())["results"]
    assert [(each["length"], each["samples"]) for each in entries] == [(64, 1500), (256, 1500)]
    assert [each.name for each in (run / "exports").iterdir()] == [LAST]
    assert (run / "exports" / LAST / "config.json").is_file()
    assert len(re.findall(r"start \d", said)) == 3 and "Stopped by SIGUSR1" in said
    (found,) = runs.find(run)
    assert found.state == "done" and status(run)["job"] == number


@pytest.mark.slow
def test_a_chain_is_followed_once(submit, tmp_path):  # noqa: F811
    numbers = submit("--chain", "3", "--requeue", "--then", "export")
    job, run = following(), tmp_path / "run"
    assert wait(numbers[0], *ENDED) == "COMPLETED"
    assert {wait(number, *ENDED) for number in numbers[1:]} == {"CANCELLED"}
    assert wait(job, *ENDED) == "COMPLETED"
    assert (run / "exports" / LAST / "config.json").is_file()


@pytest.mark.slow
def test_an_export_that_is_killed_comes_again(submit, tmp_path):  # noqa: F811
    (number,) = submit("--then", "export")
    job, run = following(), tmp_path / "run"
    assert wait(number, *ENDED) == "COMPLETED"
    wait(job, "RUNNING")
    time.sleep(4)
    subprocess.run(["scancel", "--signal=KILL", f"{job}.0"], check=True)
    wait(job, "PENDING")
    assert wait(job, *ENDED) == "COMPLETED" and restarts(job) == 1
    assert [each.name for each in (run / "exports").iterdir()] == [LAST]


@pytest.mark.slow
def test_a_run_that_fails_is_followed_by_nothing(submit, tmp_path):  # noqa: F811
    (number,) = submit("--then", "export", fault="raise 1 7")
    job, run = following(), tmp_path / "run"
    assert wait(number, *ENDED) == "FAILED" and wait(job, *ENDED) == "FAILED"
    assert "is at step 4 of 20: what was to follow is left out" in (run / "logs" / f"then_{job}.out").read_text()
    assert not (run / "exports").exists()
