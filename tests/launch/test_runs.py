"""The table of runs, from files and a queue written by hand."""

import errno
import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from megahybrid.cli import main
from megahybrid.launch import runs, slurm
from megahybrid.training.metrics_file import MetricsFile
from megahybrid.training.run_directory import RunDirectory


@pytest.fixture
def queue(monkeypatch):
    """What squeue is to say: a list to be filled."""
    jobs: list[slurm.QueuedJob] = []
    monkeypatch.setattr(runs.shutil, "which", lambda name: name)
    monkeypatch.setattr(slurm, "jobs", lambda: jobs)
    return jobs


def make(folder, name, queue, job=None, status=None, silent=0.0, reason="Priority"):
    """A run that was submitted as job 7, whose heartbeat is `silent` seconds old."""
    run = RunDirectory(folder / name)
    facts = run.path / "submit" / "then" / "job.json"
    facts.parent.mkdir(parents=True)
    facts.write_text(json.dumps({"submission": name, "jobs": ["7"]}))
    if status:
        run.write_status(status[0], 5, 20, status[1])
        told = json.loads(run.status.read_text()) | {"time": time.time() - silent, "job": "7"}
        run.status.write_text(json.dumps(told))
        run.heartbeats.mkdir()
        beat = run.heartbeats / "rank_00000.json"
        beat.write_text("{}")
        os.utime(beat, (time.time() - silent,) * 2)
        line = {"step": 5, "tokens": 5_000_000, "loss": 2.5, "tokens_per_second": 1e6, "mfu": 0.42}
        MetricsFile(run.metrics).add(line)
    if job:
        queue.append(slurm.QueuedJob("7", job, reason, name, None, 0))


@pytest.mark.parametrize(
    ("job", "status", "silent", "state", "why"),
    [
        ("PENDING", None, 0, "queued", "Priority"),
        ("RUNNING", ("running", ""), 5, "running", ""),
        ("RUNNING", ("running", ""), 600, "stalled", "no heartbeat for 10:00"),
        ("PENDING", ("stopped", "SIGUSR1"), 0, "requeued", "Priority; before: SIGUSR1"),
        (None, ("stopped", "SIGTERM"), 0, "stopped", "SIGTERM"),
        ("COMPLETED", ("done", ""), 0, "done", ""),
        ("FAILED", ("failed", "ValueError: odd"), 0, "failed", "ValueError: odd"),
        (None, ("running", ""), 600, "failed", "it ended without a word"),
        ("CANCELLED", None, 0, "failed", "the job ended before training began (cancelled)"),
    ],
)
def test_states(job, status, silent, state, why, queue, tmp_path):
    make(tmp_path, "run", queue, job, status, silent)
    (found,) = runs.find(tmp_path)
    assert (found.state, found.reason, found.jobs) == (state, why, ("7",))


def test_the_table_says_how_far_and_how_fast(queue, tmp_path):
    make(tmp_path, "a", queue, "RUNNING", ("running", ""))
    console = Console(width=200, record=True, quiet=False)
    runs.show(runs.find(tmp_path), console)
    row = next(line for line in console.export_text().splitlines() if "running" in line)
    for cell in ("5/20", "5M/20M", "1,000,000", "42.0 %", "2.5000", "0:15", "7"):
        assert cell in row.split() or cell in row, cell


def test_in_a_pipe_a_run_is_a_line(queue, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    folder = tmp_path / ("a long way down" * 6)
    make(folder, "a", queue, "PENDING", reason="Priority, and a sentence of many more words" * 2)
    runs.show(runs.find(folder))
    row = capsys.readouterr().out.splitlines()[1]
    assert str(folder / "a") in row and "queued" in row and "many more words" in row


def test_two_runs_are_told_apart_and_no_run_is_said(queue, tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 2
    assert "There is no run in" in capsys.readouterr().err
    make(tmp_path, "a", queue, "RUNNING", ("running", ""))
    make(tmp_path, "b", queue, "PENDING")
    assert [(run.path.name, run.state) for run in runs.find(tmp_path)] == [("a", "running"), ("b", "queued")]


def test_a_status_that_cannot_be_read_now_does_not_hide_the_other_runs(queue, tmp_path, monkeypatch):
    for name in ("one", "two"):
        RunDirectory(tmp_path / name).write_status("done", 20, 20)
    real = Path.read_text

    def read_text(self, *arguments, **options):
        if self == tmp_path / "one" / "status.json":
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert [(run.path.name, run.state) for run in runs.find(tmp_path)] == [("one", "failed"), ("two", "done")]


@pytest.mark.parametrize(
    ("waiting", "states"),
    [
        ("1-2,5%2", "failed queued queued failed failed queued"),
        ("1-5:2", "failed queued failed queued failed queued"),
        ("1-2,4...", "failed queued queued failed queued queued"),  # squeue names no more of a long list
    ],
)
def test_the_runs_of_an_array_that_wait_are_one_job(waiting, states, tmp_path, monkeypatch):
    jobs = [{"job_id": 8, "array_task_id": 3, "job_state": "FAILED"}]
    jobs += [{"job_id": 7, "array_task_id": None, "array_task_string": waiting, "job_state": "PENDING"}]
    told = {"jobs": [job | {"array_job_id": 7, "comment": "one"} for job in jobs]}
    (tmp_path / "squeue").write_text(f"#!/bin/bash\necho '{json.dumps(told)}'\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for element in range(6):
        facts = tmp_path / "runs" / str(element) / "submit" / "then" / "job.json"
        facts.parent.mkdir(parents=True)
        facts.write_text(json.dumps({"submission": "one", "jobs": ["7"], "element": element}))
    assert [run.state for run in runs.find(tmp_path / "runs")] == states.split()


@pytest.mark.parametrize(
    ("stub", "said"),
    [
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", "Unable to contact slurm"),
        ("echo not json", "squeue --json did not give a list"),
        ("sleep 9", "squeue did not answer within 0.2 s"),
    ],
)
def test_a_queue_that_gives_no_answer(stub, said, tmp_path, monkeypatch, capsys):
    """Runs are shown as their files tell; none is called failed because its job was not found."""
    monkeypatch.setattr(slurm, "_SECONDS", 0.2 if "sleep" in stub else 30.0)
    (tmp_path / "squeue").write_text(f"#!/bin/bash\n{stub}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    make(tmp_path / "runs", "running", [], None, ("running", ""), 5)
    make(tmp_path / "runs", "silent", [], None, ("running", ""), 600)
    make(tmp_path / "runs", "new", [])
    make(tmp_path / "runs", "failed", [], None, ("failed", "odd"))
    told = []
    found = {run.path.name: run.state for run in runs.find(tmp_path / "runs", told.append)}
    assert found == {"running": "running", "silent": "stalled", "new": "submitted", "failed": "failed"}
    (line,) = told
    assert said in line and "The queue is not known" in line
    assert main(["runs", str(tmp_path / "runs")]) == 0
    output = capsys.readouterr()
    assert said in output.err and "stalled" in output.out
