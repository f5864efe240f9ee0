"""Going back to an older checkpoint: what becomes current, what is left behind, and what W&B sees of it."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from megahybrid.cli import main
from megahybrid.config.schema import CheckpointConfig
from megahybrid.data.loader import TrainingData
from megahybrid.errors import UserError
from megahybrid.training import attempts, checkpoint_folder
from megahybrid.training.engine import Engine
from megahybrid.training.run_directory import RunDirectory
from tests.training.conftest import metrics

KEYS = ["checkpoint.every=2", "checkpoint.milestone_every=4", "train.steps=12", "train.validation_samples=2"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps(*numbers):
    return [f"step_{number:08d}" for number in numbers]


@pytest.fixture
def fails_in_step(monkeypatch):
    """Call it with a step in which the run ends by an error, or with None."""
    real = Engine.step

    def set_to(last):
        def step(self, batches, number, *flags, **others):
            if number == last:
                raise RuntimeError("the machine went away")
            return real(self, batches, number, *flags, **others)

        monkeypatch.setattr(Engine, "step", step)

    return set_to


def test_a_run_goes_back_once_a_submission_and_then_on(recipe, tmp_path, monkeypatch):
    """Back to step 4, stopped in step 6, gone on from there: the abandoned never count again."""
    command, checkpoints = ["train", str(recipe), *KEYS], tmp_path / "run" / "checkpoints"
    assert main(command) == 0
    assert names(checkpoints) == ["latest", *steps(4, 6, 8, 10, 12)]
    uninterrupted = metrics(tmp_path / "run")

    monkeypatch.setenv("MEGAHYBRID_SUBMISSION", "back to four")
    real = TrainingData.next_step

    def next_step(self):
        if self.consumed == 8 * 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self)

    monkeypatch.setattr(TrainingData, "next_step", next_step)
    assert main([*command, "train.resume_from=4"]) == 0
    assert names(checkpoints) == ["abandoned", "latest", *steps(4, 6)]
    assert names(checkpoints / "abandoned") == steps(10, 12)  # checkpoint.keep of them, the newest
    assert (checkpoints / "latest").read_text() == steps(6)[0] + "\n"
    assert metrics(tmp_path / "run") == uninterrupted[:6]

    monkeypatch.setattr(TrainingData, "next_step", real)
    assert main([*command, "train.resume_from=4"]) == 0
    assert metrics(tmp_path / "run") == uninterrupted
    told = attempts.read(RunDirectory(tmp_path / "run"))
    assert [each.get("back_to", each.get("step")) for each in told] == [4, 4, 6]
    assert [("back_to" in each) for each in told] == [False, True, False]


def test_by_hand_a_run_goes_back_every_time(recipe, tmp_path, capsys):
    command = ["train", str(recipe), "checkpoint.every=1", "train.steps=3", "train.validation_samples=2"]
    assert main(command) == 0
    for learning_rate in ("0.001", "0.002"):
        assert main([*command, "train.resume_from=2", f"optimizer.learning_rate={learning_rate}"]) == 0
        said = capsys.readouterr().out
        assert "step_00000003 moved to abandoned/" in said and "was written by" not in said
        assert names(tmp_path / "run" / "checkpoints") == ["abandoned", "latest", *steps(2, 3)]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]


def test_a_step_without_a_checkpoint_is_refused_and_nothing_changes(recipe, tmp_path, capsys):
    command = ["train", str(recipe), "checkpoint.every=1", "train.steps=3", "train.validation_samples=2"]
    assert main(command) == 0
    before = metrics(tmp_path / "run")
    assert main([*command, "train.resume_from=1"]) == 2
    assert "has no checkpoint of that step; it has 2, 3." in capsys.readouterr().err
    assert names(tmp_path / "run" / "checkpoints") == ["latest", *steps(2, 3)]
    assert metrics(tmp_path / "run") == before


def make(folder, *numbers):
    for name in steps(*numbers):
        (folder / name).mkdir(parents=True)
        (folder / name / "checkpoint.json").write_text("{}")


def test_what_latest_names_is_never_removed(tmp_path):
    make(tmp_path, 2, 4, 6, 8)
    checkpoint_folder.make_current(tmp_path, "step_00000002")
    checkpoint_folder.remove_old(tmp_path, CheckpointConfig(keep=1))
    assert names(tmp_path) == ["latest", *steps(2, 8)]


def test_of_the_abandoned_the_newest_stay(tmp_path):
    """Newest by when they were left: a later branch may be shorter."""
    make(tmp_path, 2, 40, 60)
    checkpoint_folder.abandon(tmp_path, checkpoint_folder.later(tmp_path, 2), keep=2)
    make(tmp_path, 4)
    checkpoint_folder.abandon(tmp_path, checkpoint_folder.later(tmp_path, 2), keep=2)
    assert names(tmp_path) == ["abandoned", *steps(2)]
    assert names(tmp_path / "abandoned") == steps(4, 60)


def test_a_checkpoint_counts_before_latest_says_so(tmp_path):
    """The first one of a run that ended between the two; a later one waits for `latest`."""
    make(tmp_path / "checkpoints", 2)
    assert checkpoint_folder.find(tmp_path).name == "step_00000002"
    checkpoint_folder.make_current(tmp_path / "checkpoints", "step_00000002")
    make(tmp_path / "checkpoints", 4)
    assert checkpoint_folder.find(tmp_path).name == "step_00000002"
    checkpoint_folder.make_current(tmp_path / "checkpoints", "step_00000006")
    with pytest.raises(UserError, match=r"is not whole; train.resume_from=4 goes on .*\(there are 2, 4\)"):
        checkpoint_folder.find(tmp_path)


def wandb_lines(run) -> list[tuple[str, dict]]:
    """The steps of all offline files of a run with the id of the W&B run they belong to."""
    lines = []
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        items = [json.loads(line)["history"]["item"] for line in said.splitlines() if '"type":"history"' in line]
        lines += [(file.parent.name.rpartition("-")[2], item) for item in items]
    return lines


def test_no_abandoned_step_stands_as_one_of_the_runs_in_wandb(recipe, tmp_path, fails_in_step):
    """Back from 6 to 2 with another learning rate, ended before the next checkpoint with its log lost, and on."""
    run, command = tmp_path / "run", ["train", str(recipe), "tracking.wandb=offline", "train.validation_samples=2"]
    assert main([*command, "checkpoint.every=2", "train.steps=6", "checkpoint.keep=3"]) == 0
    abandoned = json.loads((run / "wandb" / "run.json").read_text())["id"]
    other = [*command, "checkpoint.every=4", "train.steps=7", "optimizer.learning_rate=0.0001"]
    fails_in_step(4)
    with pytest.raises(RuntimeError, match="went away"):
        main([*other, "train.resume_from=2"])
    for folder in (run / "wandb").glob("offline-run-*"):
        if not folder.name.endswith(abandoned):
            shutil.rmtree(folder)
    fails_in_step(None)
    assert main(other) == 0
    lines = wandb_lines(run)
    assert [item["step"] for run_id, item in lines if run_id == abandoned] == [1, 2, 3, 4, 5, 6]
    ours = [item for run_id, item in lines if run_id != abandoned]
    assert len({run_id for run_id, _ in lines}) == 2
    assert [item["step"] for item in ours] == [1, 2, 3, 4, 5, 6, 7]
    assert [item["loss"] for item in ours] == pytest.approx([line["loss"] for line in metrics(run)], rel=1e-6)


def test_wandb_finds_both_in_one_group(recipe, tmp_path, monkeypatch):
    import wandb

    groups, real = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **given: groups.append(given["group"]) or real(**given))
    command = ["train", str(recipe), "tracking.wandb=offline", "train.validation_samples=2", "checkpoint.every=1"]
    assert main([*command, "train.steps=2"]) == 0
    assert main([*command, "train.steps=2", "train.resume_from=1"]) == 0
    assert groups == ["run", "run"]
