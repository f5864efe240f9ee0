"""One owner a run directory."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

import megahybrid.training.saver as saver
from megahybrid.cli import main
from megahybrid.training import ownership
from megahybrid.training.engine import Engine
from megahybrid.training.ownership import NotOwner, Owner
from megahybrid.training.run_directory import RunDirectory
from tests.training.conftest import metrics


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def sleeper():
    """A living process of this host."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def owned_by(run, silence=0.0, **facts):
    """Another start's owner.json, last touched `silence` seconds ago."""
    theirs = ownership._this_process() | {"token": "theirs", "host": "elsewhere", "processes": "pid:[1]"} | facts
    run.path.mkdir(parents=True, exist_ok=True)
    run.owner.write_text(json.dumps(theirs))
    os.utime(run.owner, (time.time() - silence,) * 2)


def take(run):
    """Whether a start of this process gets the run."""
    owner = Owner(run)
    try:
        owner._take()
    except NotOwner:
        return False
    owner._left.set()
    assert json.loads(run.owner.read_text())["token"] == owner._facts["token"]
    return True


def test_a_process_of_this_host_owns_a_run_as_long_as_it_lives(run, sleeper):
    began = ownership._beginning(sleeper.pid)
    here = {key: ownership._this_process()[key] for key in ("host", "processes")}
    owned_by(run, silence=1000, process=sleeper.pid, began=began, **here)
    assert not take(run)
    owned_by(run, process=sleeper.pid, began=str(int(began) - 1), **here)  # another one that had the number before
    assert take(run)
    owned_by(run, process=sleeper.pid, began=began, **here)
    sleeper.kill()
    sleeper.wait()
    assert take(run)


@pytest.mark.parametrize(
    ("facts", "silence", "free"),
    [
        ({}, 0, False),
        ({}, 59 - 10, False),
        ({}, 61, True),
        ({"job": "8"}, 0, False),
        ({"job": "7", "restart": 0}, 0, True),  # what Slurm started before this
        ({"job": "7", "restart": 1}, 0, False),  # a second srun in the same job
        ({"job": "6", "submission": "ours"}, 0, True),  # a chain's job before this one
        ({"job": "6", "submission": "theirs"}, 0, False),
    ],
)
def test_on_another_host_the_job_and_silence_tell(run, monkeypatch, facts, silence, free):
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "MEGAHYBRID_SUBMISSION": "ours"}.items():
        monkeypatch.setenv(name, value)
    owned_by(run, silence, **{"job": None, "restart": 0, "submission": None, **facts})
    assert take(run) == free


def test_of_many_starts_at_once_one_takes_over(run):
    for _ in range(20):
        owned_by(run, silence=1000)
        won, together = [], threading.Barrier(8)

        def start(won=won, together=together):
            together.wait()
            won.append(take(run))

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(won) == 1


def test_a_second_start_is_refused_by_name_and_changes_nothing(recipe, tmp_path, capsys):
    run = RunDirectory(tmp_path / "run")
    assert main(["train", str(recipe), "train.steps=2"]) == 0
    run.write_status("running", 2, 20)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    owned_by(run, job="12")
    assert main(["train", str(recipe)]) == 2
    assert "is being trained by job 12, process" in capsys.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    assert after.pop(run.owner) and after == before


def test_a_start_that_lost_its_run_writes_nothing_more(recipe, tmp_path, monkeypatch, capsys):
    """Taken for dead in step 7, as a node is that hangs for a while."""
    run, real = RunDirectory(tmp_path / "run"), Engine.step

    def step(self, batches, number, *flags, **others):
        if number == 7:
            owned_by(run, job="12")
            run.write_status("running", 5, 20, "by job 12")
        return real(self, batches, number, *flags, **others)

    monkeypatch.setattr(Engine, "step", step)
    assert main(["train", str(recipe), "checkpoint.every=2"]) == 2
    assert "belongs to job 12" in capsys.readouterr().err
    assert [line["step"] for line in metrics(run.path)] == [1, 2, 3, 4, 5, 6]
    assert (run.checkpoints / "latest").read_text() in ("step_00000004\n", "step_00000006\n")  # if it was in time
    assert run.read_status()["reason"] == "by job 12"
    assert json.loads(run.owner.read_text())["job"] == "12"


def test_a_checkpoint_is_not_completed_by_a_start_that_lost_its_run(recipe, tmp_path, monkeypatch):
    """Lost while the last checkpoint is written, after the last line of metrics."""
    run, real = RunDirectory(tmp_path / "run"), saver.write_tensors

    def write(file, tensors):
        if "step_00000004" in str(file):
            while len(metrics(run.path)) < 4:
                time.sleep(0.01)
            owned_by(run, job="12")
        return real(file, tensors)

    monkeypatch.setattr(saver, "write_tensors", write)
    assert main(["train", str(recipe), "checkpoint.every=2", "train.steps=4"]) == 2
    assert (run.checkpoints / "latest").read_text() == "step_00000002\n"
    assert not (run.checkpoints / "step_00000004").exists()


def test_a_finished_start_leaves_no_owner(reference):
    assert not (reference / "owner.json").exists()


def test_an_owner_that_was_removed_by_hand_is_made_anew(run):
    owner = Owner(run)
    owner._take()
    run.owner.unlink()
    owner.check_here()
    assert json.loads(run.owner.read_text())["token"] == owner._facts["token"]
    owner._left.set()


def start_on_a_node(recipe: str, folders: list[str], unseen: int) -> str | None:
    """In a worker, which is a node of its own: what a start says whose relative run.dir lies in its folder.

    The first `unseen` looks at what another node has written find nothing, as with an NFS client.
    """
    from megahybrid.config import load_config
    from megahybrid.errors import UserError
    from megahybrid.training.loop import train

    rank, real, looks, home = int(os.environ["RANK"]), ownership.read_json, iter(range(unseen)), os.getcwd()
    os.environ["LOCAL_RANK"] = "0"
    ownership.socket.gethostname, host = (lambda: f"node{rank}"), ownership.socket.gethostname
    ownership._SECONDS_TO_BE_SEEN = 1.0 if unseen else 0.0
    ownership.read_json = lambda file: None if next(looks, None) is not None else real(file)
    os.chdir(folders[rank])
    try:
        train(load_config(recipe, ["run.dir=run", "train.steps=1", "train.validation_samples=2"]), lambda text: None)
    except UserError as error:
        return str(error)
    finally:
        os.chdir(home)
        ownership.socket.gethostname, ownership.read_json = host, real


def test_a_run_directory_on_a_disk_of_each_node_is_refused(recipe, tmp_path, workers):
    """At once, and without a trace; a shared one may be seen late."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    start = "tests.training.test_ownership:start_on_a_node"
    said = workers.run(2, start, str(recipe), list(map(str, folders)), 0)
    assert all("run.dir 'run' is not the same folder on node1 as on node0;" in each for each in said)
    assert not [*folders[0].iterdir(), *folders[1].iterdir()]
    assert workers.run(2, start, str(recipe), [str(folders[0])] * 2, 2) == [None, None]
    assert (folders[0] / "run" / "checkpoints" / "latest").exists()
