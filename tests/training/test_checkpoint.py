import errno
import json
import os
import shutil

import pytest

import megahybrid.training.saver as saver
from megahybrid import code_version, retry
from megahybrid.cli import main
from megahybrid.training import checkpoint
from megahybrid.training.engine import Engine
from tests.training.conftest import RECIPE, metrics


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def weights(run, step):
    return (run / "checkpoints" / f"step_{step:08d}" / "weights-00000.safetensors").read_bytes()


def test_keep_and_milestones(recipe, tmp_path):
    overrides = ["train.steps=7", "checkpoint.every=1", "checkpoint.keep=2", "checkpoint.milestone_every=3"]
    assert main(["train", str(recipe), *overrides]) == 0
    assert names(tmp_path / "run") == ["latest"] + [f"step_0000000{step}" for step in (3, 5, 6, 7)]


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(recipe, tmp_path, monkeypatch, capsys, reference):
    real = saver.write_tensors

    def full(file, tensors):
        if "step_00000010" in str(file) and "exp_avg_sq" in str(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, tensors)

    monkeypatch.setattr(saver, "write_tensors", full)
    monkeypatch.setattr(saver, "_SECONDS_AT_ONCE", 0.0)
    monkeypatch.setattr(retry, "SECONDS_BESIDE_TRAINING", 0.0)
    assert main(["train", str(recipe)]) == 2
    message = capsys.readouterr().err
    assert "could not be written (No space left on device); make room and start again" in message
    assert names(tmp_path / "run") == ["latest", "step_00000005"]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    monkeypatch.setattr(saver, "write_tensors", real)
    assert main(["train", str(recipe)]) == 0
    assert metrics(tmp_path / "run") == metrics(reference)


def test_a_checkpoint_without_its_files_names_an_older_one(recipe, tmp_path, capsys):
    assert main(["train", str(recipe), "train.steps=10"]) == 0
    last = tmp_path / "run" / "checkpoints" / "step_00000010"
    (last / "exp_avg-00000.safetensors").unlink()
    assert main(["train", str(recipe)]) == 2
    message = capsys.readouterr().err
    assert "exp_avg-00000.safetensors' is missing" in message and "train.resume_from=5 goes on" in message
    shutil.rmtree(last)
    assert main(["train", str(recipe)]) == 2
    assert "step_00000010' is not whole" in capsys.readouterr().err


def test_more_steps_go_on_and_fewer_are_done(recipe, tmp_path, monkeypatch, capsys):
    keys = ["optimizer.schedule=constant", "train.log_every=3"]
    assert main(["train", str(recipe), "train.steps=4", *keys]) == 0
    monkeypatch.setattr(checkpoint, "code_version", lambda: "0.2 with-other-code")
    capsys.readouterr()
    assert main(["train", str(recipe), "train.steps=6", *keys]) == 0
    assert f"was written by megahybrid {code_version()}, this is 0.2 with-other-code.\n" in capsys.readouterr().out
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "kept" in line and "lambda" in line] == [3, 4, 6]
    assert main(["train", str(recipe), "train.steps=5", *keys]) == 0
    assert "has done 6 steps, and train.steps is 5" in capsys.readouterr().out


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory, text, prepared):
    """A run of the tiny recipe that has stopped after two steps."""
    folder = tmp_path_factory.mktemp("two_steps")
    (folder / "recipe.yaml").write_text(RECIPE.format(run=folder / "run", data=prepared, text=text))
    assert main(["train", str(folder / "recipe.yaml"), "train.steps=2"]) == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("override", "refused"),
    [
        ("train.seq_length=32", True),
        ("train.seed=1", True),
        ("train.global_batch_size=4", True),
        ("data.document_masking=false", True),
        ("model.pattern=GLSFG", True),
        ("model.pattern=GL|SF|L", False),
        ("model.lte.buffer_size=9", True),
        ("optimizer.learning_rate=0.001", False),
        ("train.micro_batch_size=1", False),
        ("checkpoint.keep=1", False),
    ],
)
def test_which_keys_may_change_on_resume(override, refused, recipe, two_steps, tmp_path, capsys):
    shutil.copytree(two_steps, tmp_path / "run")
    assert main(["train", str(recipe), "train.steps=3", override]) == (2 if refused else 0)
    if refused:
        assert f"was trained with {override.split('=')[0]} = " in capsys.readouterr().err
        assert len(metrics(tmp_path / "run")) == 2


def test_init_from_takes_weights_and_lambdas_and_nothing_else(recipe, reference, tmp_path, capsys):
    overrides = ["train.steps=1", f"train.init_from={reference}", "optimizer.learning_rate=1e-12"]
    assert main(["train", str(recipe), *overrides]) == 0
    line = metrics(tmp_path / "run")[0]
    assert line["step"] == 1
    assert line["loss"] < metrics(reference)[0]["loss"] - 0.7
    assert line["lambda"] == metrics(reference)[-1]["lambda"]
    assert "What regulates L (retention) goes on as it was there.\n" in capsys.readouterr().out
    assert line["validation_loss"] == pytest.approx(metrics(reference)[-1]["validation_loss"], rel=1e-5)


def test_init_from_an_exported_model_is_refused_with_what_makes_a_checkpoint_of_it(recipe, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert main(["train", str(recipe), f"train.init_from={tmp_path / 'model'}"]) == 2
    said = capsys.readouterr().err
    assert (
        f"no checkpoint in '{tmp_path}/model'; make one" in said
        and f"`megahybrid import {tmp_path}/model TARGET`" in said
    )


def test_init_from_of_another_pattern_begins_with_lambdas_of_its_own(recipe, reference, tmp_path, capsys):
    command = ["train", str(recipe), "train.steps=1", f"train.init_from={reference}", "model.pattern=GLSFF"]
    assert main(command) == 0
    assert metrics(tmp_path / "run")[0]["lambda"] == [[0.0] * 4]
    assert "What regulates L (retention) begins anew" in capsys.readouterr().out


def test_a_stage_of_long_context_goes_on_from_weights_and_lambdas(recipe, reference, tmp_path):
    """Samples three times as long, another rotation and a capped buffer, to whose size the controller steers on."""
    length = ["train.seq_length=192", "train.micro_batch_size=1", f"data.path={tmp_path / 'long'}"]
    model = ["model.attention.rope_theta=50000", "model.lte.train_cap=true", "model.lte.loss.maximum=4"]
    assert main(["prepare", str(recipe), *length]) == 0
    command = ["train", str(recipe), *length, *model, f"train.init_from={reference}", "train.steps=4"]
    assert main([*command, "optimizer.learning_rate=1e-3"]) == 0
    first, *_, last = metrics(tmp_path / "run")
    assert first["lambda"] == metrics(reference)[-1]["lambda"] != last["lambda"]
    assert first["loss"] < metrics(reference)[0]["loss"] - 0.7
    assert 64 < max(kept for layer in first["kept"] for kept in layer) <= 192


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_init_from_keeps_every_bit_in_bf16(stage, recipe, reference, tmp_path):
    still = ["optimizer.learning_rate=1e-30", "optimizer.weight_decay=0", f"parallel.zero_stage={stage}"]
    command = ["train", str(recipe), "train.dtype=bf16", "train.steps=1", f"train.init_from={reference}", *still]
    assert main(command) == 0
    assert weights(tmp_path / "run", 1) == weights(reference, 20)


def test_bf16_resumes_bit_equal(recipe, tmp_path, monkeypatch):
    runs = []
    for stop in (None, 4):
        run = tmp_path / f"run_{stop}"
        command = ["train", str(recipe), "train.dtype=bf16", "train.steps=8", "checkpoint.every=3", f"run.dir={run}"]
        if stop:
            real = Engine.step

            def dies(self, batches, step, *flags, real=real, **others):
                if step == 5:
                    raise RuntimeError("the machine went away")
                return real(self, batches, step, *flags, **others)

            monkeypatch.setattr(Engine, "step", dies)
            with pytest.raises(RuntimeError):
                main(command)
            monkeypatch.setattr(Engine, "step", real)
        assert main(command) == 0
        runs.append(run)
    assert metrics(runs[0]) == metrics(runs[1])
    assert weights(runs[0], 8) == weights(runs[1], 8)


@pytest.mark.slow
def test_bf16_learns_as_fp32_does(recipe, reference, tmp_path):
    assert main(["train", str(recipe), "train.dtype=bf16"]) == 0
    ours, theirs = metrics(tmp_path / "run")[-1], metrics(reference)[-1]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.03)


def test_z_loss_pulls_the_normaliser_and_leaves_the_reported_loss_alone(recipe, reference, tmp_path):
    assert main(["train", str(recipe), "train.z_loss=1", "train.steps=1"]) == 0
    ours, theirs = metrics(tmp_path / "run"), metrics(reference)
    assert ours[0]["loss"] == theirs[0]["loss"]
    assert ours[0]["grad_norm"] > 1.05 * theirs[0]["grad_norm"]
