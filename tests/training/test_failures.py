"""Every start's failure is its own: no other start's hides or fakes it, and no status hides it."""

import errno
import os

import pytest

from megahybrid import retry
from megahybrid.errors import MachineFault, UserError
from megahybrid.files import write_json
from megahybrid.training import failures
from megahybrid.training.ownership import NotOwner
from megahybrid.training.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.001)
    return RunDirectory(tmp_path / "run")


def told(run: RunDirectory) -> tuple:
    status = run.read_status()
    return tuple(status[key] for key in ("state", "step", "reason", "again", "restart"))


def test_a_later_start_records_its_own_failure(run, monkeypatch):
    run.write_status("running", 1000, 5000)
    failures.record(run, UserError("The data is damaged."), 1200)
    assert told(run) == ("failed", 1200, "The data is damaged.", False, 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert failures.read(run) is None
    failures.record(run, MachineFault("Node n5 did not come."))
    assert told(run) == ("failed", 1200, "Node n5 did not come.", True, 1)
    assert run.failure.read_text().startswith("Node n5 did not come.\n")
    before = failures.read(run, "7-0")
    assert (before.cause, before.again, before.step) == ("The data is damaged.", False, 1200)


def test_a_start_that_was_refused_the_run_says_nothing_about_it(run):
    run.write_status("running", 1000, 5000)
    failures.record(run, NotOwner("The run is job 6's."))
    assert run.read_status()["state"] == "running" and not run.failure.exists()
    assert failures.read(run).cause == "The run is job 6's."


def test_the_first_of_a_start_decides(run):
    failures.record(run, ValueError("the seventh batch is odd"), 6)
    failures.record(run, MachineFault("Rank 5 died."), 7)
    assert failures.read(run).cause == "ValueError: the seventh batch is odd"
    assert "Traceback" not in failures.read(run).cause and "ValueError" in run.failure.read_text().splitlines()[-1]
    assert told(run)[:4] == ("failed", 6, "ValueError: the seventh batch is odd", False)


@pytest.mark.parametrize("state", ["running", "stopped", "done"])
def test_no_other_state_comes_over_failed(run, state, monkeypatch):
    failures.record(run, ValueError("odd"), 10)
    run.write_status(state, 10, 20)
    assert told(run)[0] == "failed"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run.write_status(state, 10, 20)
    assert told(run)[0] == state


def test_a_status_that_came_between_is_mended_by_the_main_process(run, monkeypatch):
    """It looked for a failure, another process recorded one, and then it wrote "running"."""
    failures.record(run, ValueError("odd"), 10)
    running = run.read_status() | {"state": "running", "reason": ""}
    for rank, state in (("5", "running"), ("0", "failed")):
        write_json(run.status, running)
        monkeypatch.setenv("RANK", rank)
        failures.record(run, MachineFault("Rank 5 died."), 10)
        assert told(run)[0] == state
    assert told(run)[2:4] == ("ValueError: odd", False)


def test_starts_by_hand_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    one, two = RunDirectory(tmp_path), RunDirectory(tmp_path)
    two.by_hand = "another"
    failures.record(one, MachineFault("One."))
    failures.record(two, MachineFault("Two."))
    assert (failures.read(one).cause, failures.read(two).cause) == ("One.", "Two.")
    failures.forget(two)
    assert failures.read(two) is None and failures.read(one).cause == "One."


def test_a_disk_that_refuses_once_gets_the_failure(run, monkeypatch):
    real, left = os.link, [errno.ESTALE, errno.EIO]

    def link(*paths):
        if left:
            raise OSError(left.pop(), "refused")
        real(*paths)

    monkeypatch.setattr(os, "link", link)
    failures.record(run, ValueError("odd"))
    assert failures.read(run).cause == "ValueError: odd" and told(run)[0] == "failed"
    assert [path.name for path in run.failure_of("7-0").parent.iterdir()] == ["7-0.txt"]


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_what_may_succeed_when_it_is_started_again(run, error, again):
    failures.record(run, error)
    assert failures.read(run).again is again
