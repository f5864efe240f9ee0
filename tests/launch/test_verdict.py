"""The verdict on starts that end before the loop, and on those that end again and again."""

import errno
import sys
from pathlib import Path

import pytest

from megahybrid import retry
from megahybrid.errors import MachineFault, UserError
from megahybrid.launch import verdict
from megahybrid.training import attempts, checkpoint_folder, failures
from megahybrid.training.ownership import NotOwner
from megahybrid.training.run_directory import RunDirectory
from tests.training.conftest import RECIPE

LIMIT = "watch: {restarts: 1}, dtype:"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("MEGAHYBRID_SUBMISSION", "one")
    monkeypatch.setattr(verdict, "_cancel_chain", lambda: None)
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def start(monkeypatch):
    return lambda number: monkeypatch.setenv("SLURM_RESTART_COUNT", str(number))


def state(run: RunDirectory) -> tuple:
    status = run.read_status()
    return status["state"], status["again"], status["restart"]


def test_a_node_that_is_missing_at_a_second_start_is_waited_for(run, start):
    start(0)
    run.write_status("running", 1000, 5000)
    failures.record(run, UserError("The data is damaged."), 1200)
    assert verdict.judge(run, 1)[0] == 1
    start(1)
    failures.record(run, MachineFault("node n5 (rank 40) did not come"))
    code, said = verdict.judge(run, 1)
    assert code == verdict.GO_ON and "node n5" in said and "damaged" not in said
    assert state(run) == ("failed", True, 1)


@pytest.mark.parametrize(
    ("begun", "exit_code", "code"), [(True, 1, verdict.GO_ON), (False, 137, verdict.GO_ON), (False, 1, 1)]
)
def test_processes_that_leave_no_word(run, start, begun, exit_code, code):
    """Killed they may succeed elsewhere; those that end by themselves before training began have a wrong program."""
    start(0)
    run.write_status("stopped", 5, 20, "SIGUSR1")
    start(1)
    if begun:
        assert attempts.begin(run, 5, 4, restarts=2) is None
    assert verdict.judge(run, exit_code)[0] == code
    assert state(run) == ("failed", code == verdict.GO_ON, 1)
    assert f"srun's exit code {exit_code}" in run.failure.read_text()


def test_a_status_that_says_running_over_a_failure_is_not_believed(run, start):
    start(0)
    run.write_status("running", 10, 20)
    failures.record(run, ValueError("odd"), 10)
    failed = failures.read(run).text
    failures.forget(run)
    run.write_status("running", 10, 20)
    run.failure_of(run.start).write_text(failed)
    assert verdict.judge(run, 1)[0] == 1
    assert state(run) == ("failed", False, 0)


def test_giving_up_has_the_cause_of_the_last_start(run, start):
    for number in range(3):
        start(number)
        assert attempts.begin(run, 4, 4, restarts=2) is None
        failures.record(run, MachineFault(f"GPU {number} fell off the bus."), 6)
        assert verdict.judge(run, 1)[0] == verdict.GO_ON
    start(3)
    fault = attempts.begin(run, 4, 4, restarts=2)
    failures.record(run, UserError(fault))
    assert verdict.judge(run, 1)[0] == 1
    for told in (run.read_status()["reason"], run.failure.read_text().splitlines()[0]):
        assert "started 3 times from step 4" in told and "GPU 2 fell off the bus; mend that" in told
        assert str(run.failure_of("7-2")) in told
    assert state(run) == ("failed", False, 3)


def test_nodes_that_never_come_are_given_up(run, start, tmp_path, monkeypatch):
    """Nobody gets so far as to count: the verdict does, with the limit of the configuration."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(run=run.path, data=tmp_path, text=tmp_path).replace("dtype:", LIMIT, 1))
    argv = ["verdict", str(run.path), "--config", str(recipe), "--exit-code", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    checkpoint_folder.make_current(run.checkpoints, "step_00000004")
    start(0)
    assert attempts.begin(run, 4, 4, restarts=1) is None
    failures.record(run, MachineFault("GPU 0 fell off the bus."), 6)
    assert verdict.main() == verdict.GO_ON
    start(1)
    failures.record(run, MachineFault("node n5 did not come."))
    assert verdict.main() == 1
    assert state(run) == ("failed", False, 1)
    assert "started 2 times from step 4" in run.read_status()["reason"] and "node n5" in run.read_status()["reason"]
    assert verdict.main() == 1


@pytest.fixture
def refuse(monkeypatch):
    """The disk refuses to read or write files of this name, `times` times."""
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(retry, "SECONDS", 0.05)
    real, left = Path.read_text, {}

    def read_text(self, *arguments, **options):
        if left.get(self.name, 0) > 0:
            left[self.name] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    return lambda name, times: left.update({name: times})


def test_a_status_that_the_disk_refuses_for_a_moment_is_no_end(run, start, refuse):
    start(0)
    run.write_status("stopped", 3, 20, "SIGUSR1")
    refuse("status.json", 2)
    assert verdict.judge(run, 0)[0] == verdict.GO_ON


def test_what_cannot_be_read_at_all_is_started_again(run, start, refuse, monkeypatch, capsys):
    start(0)
    run.write_status("done", 20, 20)
    refuse("status.json", 10**6)
    monkeypatch.setattr(sys, "argv", ["verdict", str(run.path), "--exit-code", "0"])
    assert verdict.main() == verdict.GO_ON
    assert "it is started again" in capsys.readouterr().out


def test_a_failure_that_no_disk_takes_is_judged_all_the_same(run, start, monkeypatch):
    start(0)
    run.write_status("running", 3, 20)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(failures, "_create", full)
    code, said = verdict.judge(run, 1)
    assert code == verdict.GO_ON and "All processes ended without a word" in said


def test_a_failed_start_whose_record_is_lost_is_not_done(run, start):
    start(0)
    run.path.mkdir()
    run.write_status("failed", 3, 20, "Rank 1 died.", again=True)
    assert verdict.judge(run, 1)[0] == verdict.GO_ON
    run.write_status("failed", 3, 20, "ValueError: odd")
    assert verdict.judge(run, 1) == (1, "Failed at step 3 of 20: ValueError: odd")


def test_a_start_that_was_refused_the_run_before_there_is_a_status(run, start):
    start(0)
    failures.record(run, NotOwner("The run is being trained by job 6."))
    code, said = verdict.judge(run, 1)
    assert code == 1 and said.startswith("The run is being trained by job 6.\n")
    assert not run.status.exists()


def test_starts_before_a_checkpoint_do_not_count_after_it(run, start):
    """Three starts from step 0, of which the last one saved; then a node does not come."""
    for number in range(3):
        start(number)
        assert attempts.begin(run, 0, 4, restarts=3) is None
    checkpoint_folder.make_current(run.checkpoints, "step_00005000")
    start(3)
    failures.record(run, MachineFault("node n5 did not come"))
    assert verdict.judge(run, 1, restarts=3)[0] == verdict.GO_ON
    for number in range(4, 7):
        start(number)
        failures.record(run, MachineFault("node n5 did not come"))
        code, said = verdict.judge(run, 1, restarts=3)
    assert code == 1 and "was started 4 times" in said
