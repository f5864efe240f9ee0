import errno
import json
import operator
import os
import threading
from collections import Counter
from pathlib import Path

import pytest
from safetensors import safe_open

import megahybrid.training.saver as saver
from megahybrid import retry
from megahybrid.cli import main
from megahybrid.config.schema import ParallelConfig
from megahybrid.parallel import groups
from megahybrid.training.engine import Engine
from tests.model import tiny
from tests.training.conftest import metrics


def train_with_full_disk(recipe, full_rank, patience, *overrides):
    """One rank of a run on whose rank `full_rank` the checkpoint of step 16 does not fit; what it was told."""
    from megahybrid.config import load_config
    from megahybrid.errors import UserError
    from megahybrid.training.loop import train

    real = saver.write_tensors

    def full(file, tensors):
        if "step_00000016" in str(file) and int(os.environ["RANK"]) == full_rank:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, tensors)

    saver.write_tensors = full
    before = saver._SECONDS_AT_ONCE, retry.SECONDS_BESIDE_TRAINING
    saver._SECONDS_AT_ONCE, retry.SECONDS_BESIDE_TRAINING = 0.0, patience
    try:
        train(load_config(recipe, overrides))
    except UserError as error:
        return str(error)
    finally:
        saver.write_tensors = real
        saver._SECONDS_AT_ONCE, retry.SECONDS_BESIDE_TRAINING = before


@pytest.mark.parametrize("full_rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_disk_that_is_full_for_one_rank_ends_all_and_keeps_the_last_checkpoint(full_rank, workers, recipe, tmp_path):
    layout = ["parallel.pipeline=2", "train.micro_batch_size=1", "train.steps=24", "checkpoint.every=8"]
    run = "tests.training.test_saver:train_with_full_disk"
    told = workers.run(2, run, str(recipe), full_rank, 0.0, *layout)
    assert all("step_00000016 " in each and "could not be written (No space left" in each for each in told)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000008"]
    assert workers.run(2, run, str(recipe), full_rank, 600.0, *layout, "checkpoint.keep=9") == [None, None]
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 25))
    steps = [int(path.name[5:]) for path in sorted(checkpoints.glob("step_*"))]
    assert steps[0] == 8 and 16 < steps[1] < steps[-1] == 24  # when the others know, it is due


def test_old_checkpoints_and_what_is_left_of_others_are_removed_beside_training(recipe, tmp_path, monkeypatch):
    threads = []

    def noting(remove):
        def noted(*arguments):
            threads.append(threading.current_thread())
            remove(*arguments)

        return noted

    monkeypatch.setattr(saver.checkpoint_folder, "remove_old", noting(saver.checkpoint_folder.remove_old))
    monkeypatch.setattr(saver.Saver, "_remove_left", noting(saver.Saver._remove_left))
    for left in (".step_00000007.0123.part", ".step_00000002.old"):
        (tmp_path / "run" / "checkpoints" / left / "files").mkdir(parents=True)
    assert main(["train", str(recipe), "train.steps=3", "checkpoint.every=1", "checkpoint.keep=1"]) == 0
    assert len(threads) == 6 and threading.main_thread() not in threads
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000003"]


def test_a_folder_that_cannot_be_listed_once_does_not_end_the_run(recipe, tmp_path, monkeypatch):
    faults, real = [OSError(errno.ESTALE, os.strerror(errno.ESTALE))], Path.glob

    def glob(self, pattern):
        if pattern == ".step_*.part" and faults:
            raise faults.pop()
        return real(self, pattern)

    monkeypatch.setattr(Path, "glob", glob)
    (left := tmp_path / "run" / "checkpoints" / ".step_00000007.0123.part").mkdir(parents=True)
    assert main(["train", str(recipe), "train.steps=2", "checkpoint.every=1"]) == 0
    assert not faults and not left.exists()


def test_every_parameter_is_written_once_by_one_of_the_ranks(workers, recipe, reference, tmp_path):
    layout = ["parallel.pipeline=2", "train.steps=1"]
    workers.run(2, "tests.training.test_saver:train_with_full_disk", str(recipe), -1, 0.0, *layout)
    folders = tmp_path / "run" / "checkpoints" / "step_00000001", reference / "checkpoints" / "step_00000020"
    ours, theirs = (names(folder, "exp_avg") for folder in folders)
    assert len(list(folders[0].glob("exp_avg-*"))) == 2
    assert ours == theirs and set(ours.values()) == {1}
    facts = json.loads((folders[0] / "checkpoint.json").read_text())
    assert facts["layout"]["pipeline"] == 2 and facts["parameters"].keys() == ours.keys()


def names(folder, kind):
    found = Counter()
    for file in folder.glob(f"{kind}-*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found.update(tensors.keys())
    return found


@pytest.mark.parametrize("held", ["write_tensors", "checkpoint_folder.make_current"])
def test_steps_go_on_while_a_checkpoint_is_written(held, recipe, reference, tmp_path, monkeypatch):
    """The write of step 5, or that it becomes current, is held back until step 8: `latest` comes after that, the
    losses stay."""
    go_on, latest, seen = threading.Event(), tmp_path / "run" / "checkpoints" / "latest", {}
    real, real_step = operator.attrgetter(held)(saver), Engine.step

    def held_back(*arguments):
        assert go_on.wait(60)
        return real(*arguments)

    def step(self, batches, step, *flags, **others):
        if step == 8:
            go_on.set()
        result = real_step(self, batches, step, *flags, **others)
        seen[step] = latest.exists(), result.saving
        return result

    monkeypatch.setattr(f"{saver.__name__}.{held}", held_back)
    monkeypatch.setattr(Engine, "step", step)
    assert main(["train", str(recipe)]) == 0
    assert [seen[number][0] for number in (5, 6, 7)] == [False] * 3
    if held == "write_tensors":
        assert [seen[number][1] for number in (5, 6, 7)] == [False, True, True]
    assert latest.read_text() == "step_00000020\n"
    assert metrics(tmp_path / "run") == metrics(reference)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "checkpoint_seconds" in line] == [5, 10, 15, 20]


@pytest.fixture
def one_process():
    groups.initialize(ParallelConfig())
    yield
    groups.shut_down()


@pytest.mark.parametrize("members", [1, 2, 5])
@pytest.mark.usefixtures("one_process")
def test_ranks_have_about_equally_much_to_write(members):
    model = tiny.model("GLSFG")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    owner = saver.owners(model, members)
    load = [sum(sizes[name] for name in owner if owner[name] == member) for member in range(members)]
    assert owner.keys() == sizes.keys()
    assert max(load) - min(load) <= max(sizes.values())


def test_missing_host_memory_is_told(recipe, tmp_path, monkeypatch, capsys):
    def none_left(shape):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("megahybrid.training.saver._host_tensor", none_left)
    assert main(["train", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert "no host memory for a checkpoint (DefaultCPUAllocator" in said and "GiB together" in said
    assert not list((tmp_path / "run").glob("checkpoints/*"))
