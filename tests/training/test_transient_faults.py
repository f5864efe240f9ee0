"""Disks that refuse for a while end no run: what was to be written is written later, what was to be read is read."""

import errno
import json
import os

import pytest

import megahybrid.training.loop as loop
import megahybrid.training.saver as saver
from megahybrid import retry
from megahybrid.cli import main
from megahybrid.launch.task import GO_ON
from megahybrid.training import checkpoint, checkpoint_folder, resume
from megahybrid.training.engine import Engine
from megahybrid.training.metrics_file import MetricsFile
from megahybrid.training.run_directory import RunDirectory
from tests.training.conftest import metrics

SHORT = ["train.steps=6", "checkpoint.every=2", "checkpoint.keep=9", "train.validation_samples=2"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Tried again without long pauses; a part of a checkpoint not at once."""
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(saver, "_SECONDS_BETWEEN_LAST_TRIES", 0.001)
    monkeypatch.setattr(saver, "_SECONDS_AT_ONCE", 0.0)


@pytest.fixture
def refuse(monkeypatch):
    """Makes a function of a module refuse `times` times, where `when` says so; gives the refusals still to come."""

    def refuse(module, name, times=1, when=lambda *arguments: True, number=errno.EIO):
        real, left = getattr(module, name), [times]

        def refusing(*arguments, **others):
            if left[0] and when(*arguments):
                left[0] -= 1
                raise OSError(number, os.strerror(number))
            return real(*arguments, **others)

        monkeypatch.setattr(module, name, refusing)
        return left

    return refuse


def saved(tmp_path) -> list[int]:
    folder = tmp_path / "run" / "checkpoints"
    steps = [int(path.name.removeprefix("step_")) for path in sorted(folder.glob("step_*"))]
    assert (folder / "latest").read_text() == f"step_{steps[-1]:08d}\n" and len(steps) == len(
        list(folder.iterdir())
    ) - 1
    files = {path.name for path in (tmp_path / "run" / "checkpoints" / f"step_{steps[-1]:08d}").iterdir()}
    assert all({each.name for each in saved.iterdir()} == files for saved in folder.glob("step_*"))
    assert "weights-00000.safetensors" in files
    return steps


def of_step(step):
    return lambda file, *others: f"step_{step:08d}" in str(file)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC])
def test_a_save_that_failed_is_due_again_at_the_next_step(number, recipe, tmp_path, refuse):
    refuse(saver, "write_tensors", 99, of_step(4), number)
    assert main(["train", str(recipe), *SHORT]) == 0
    assert saved(tmp_path) in ([2, 5, 6], [2, 6])  # when the next step hears of it
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert "could not be written" in (tmp_path / "run" / "logs" / "rank_00000.log").read_text()


def test_a_short_refusal_does_not_cost_the_checkpoint(recipe, tmp_path, refuse, monkeypatch):
    monkeypatch.setattr(saver, "_SECONDS_AT_ONCE", 20.0)
    left = [
        refuse(saver, "write_tensors", 2, of_step(4)),
        refuse(saver, "write_json", 1, of_step(4)),
        refuse(checkpoint_folder, "write_text", 1),  # after the folder has its name
    ]
    assert main(["train", str(recipe), *SHORT]) == 0
    assert left == [[0], [0], [0]] and saved(tmp_path) == [2, 4, 6]


@pytest.mark.parametrize("what", ["write_tensors", "write_json"])
def test_the_last_step_is_saved_after_all(what, recipe, tmp_path, refuse):
    left = refuse(saver, what, 3, of_step(6))
    assert main(["train", str(recipe), *SHORT]) == 0
    assert left == [0] and saved(tmp_path) == [2, 4, 6]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"


def test_old_checkpoints_that_cannot_be_removed_do_not_undo_the_new_one(recipe, tmp_path, refuse):
    left = refuse(checkpoint_folder, "remove_old", 99)
    assert main(["train", str(recipe), *SHORT]) == 0
    assert saved(tmp_path) == [2, 4, 6] and left == [96]


@pytest.mark.parametrize(("number", "again"), [(errno.EIO, True), (errno.ENOSPC, False)])
def test_saves_that_keep_failing_end_the_run(number, again, recipe, tmp_path, refuse, monkeypatch, capsys):
    """As a fault of the machine, or where another one would not help, for good."""
    monkeypatch.setattr(retry, "SECONDS_BESIDE_TRAINING", 0.0)
    refuse(saver, "write_tensors", 99, of_step(4), number)
    assert main(["train", str(recipe), *SHORT]) == (GO_ON if again else 2)
    said = capsys.readouterr().err
    assert "checkpoint step_00000004 " in said and os.strerror(number) in said and "start again" in said
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["again"]) == ("failed", again)
    assert saved(tmp_path) == [2]


def test_metrics_wait_and_a_checkpoint_waits_for_them(recipe, tmp_path, monkeypatch):
    """From step 2 to 4 the disk takes no metrics: until then `latest` must not pass over their lines."""
    real_write, real_step, latest = MetricsFile.write, Engine.step, tmp_path / "run" / "checkpoints" / "latest"
    now, seen = [0], {}

    def write(self):
        if 2 <= now[0] <= 4:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real_write(self)

    def step(self, batches, step, *flags, **others):
        now[0], seen[step] = step, latest.exists()
        return real_step(self, batches, step, *flags, **others)

    monkeypatch.setattr(MetricsFile, "write", write)
    monkeypatch.setattr(Engine, "step", step)
    assert main(["train", str(recipe), *SHORT]) == 0
    assert not any(seen[number] for number in (3, 4, 5)) and saved(tmp_path)[-1] == 6
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_start_reads_and_writes_again_what_was_refused(recipe, tmp_path, refuse):
    assert main(["train", str(recipe), *SHORT, "train.steps=4"]) == 0
    left = [
        refuse(checkpoint_folder, "find"),
        refuse(resume, "load_config"),
        refuse(checkpoint, "facts_of"),
        refuse(checkpoint, "read_part"),
        refuse(checkpoint.Path, "read_text", 1, lambda path, *others: path.name == "checkpoint.json"),
        refuse(RunDirectory, "cut_metrics"),
        refuse(loop, "save_config"),
        refuse(RunDirectory, "write_status", 1, lambda run, state, *others: state == "running"),
        refuse(RunDirectory, "write_status", 1, lambda run, state, *others: state == "done"),
    ]
    assert main(["train", str(recipe), *SHORT]) == 0
    assert left == [[0]] * len(left)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"
