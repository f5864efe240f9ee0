"""Whole runs through the command line, on real text."""

import json
import shutil
import subprocess
import sys

import pytest

from megahybrid.cli import main
from megahybrid.config import load_config
from megahybrid.data import TrainingData
from megahybrid.training import engine
from megahybrid.training.engine import Engine
from megahybrid.training.step_report import StepReport
from tests.training.conftest import assert_same_run, metrics
from tools.workers import environment


def test_it_learns_and_leaves_a_complete_run_directory(reference):
    lines = metrics(reference)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["tokens"] for line in lines] == [512 * step for step in range(1, 21)]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.8
    assert lines[-1]["validation_loss"] < lines[0]["loss"] - 0.8
    assert {"loss", "grad_norm", "learning_rate", "kept", "lambda"} <= set(lines[0])
    assert [len(heads) for heads in lines[0]["kept"]] == [4, 4]
    status = json.loads((reference / "status.json").read_text())
    assert (status["state"], status["step"], status["target"]) == ("done", 20, 20)
    kept = sorted(path.name for path in (reference / "checkpoints").iterdir())
    assert kept == ["latest", "step_00000015", "step_00000020"]
    assert (reference / "config.yaml").exists()


def test_a_finished_run_says_so(reference, capsys):
    before = (reference / "metrics.jsonl").read_bytes()
    assert main(["train", str(reference.parent / "recipe.yaml")]) == 0
    assert "has done 20 steps, and train.steps is 20" in capsys.readouterr().out
    assert (reference / "metrics.jsonl").read_bytes() == before


def test_an_included_source_that_is_null_was_never_there(reference, recipe, prepared, tmp_path):
    """It is not prepared, and a run of a recipe without it goes on with one that removes it, to the last bit."""
    base, run = tmp_path / "base.yaml", tmp_path / "run"
    base.write_text(
        recipe.read_text().replace("{python:", "{web: {path: /absent, format: parquet, weight: 3}, python:")
    )
    recipe.write_text(f"include: base.yaml\ndata: {{path: {tmp_path / 'data'}, sources: {{web: null}}}}\n")
    assert main(["prepare", str(recipe)]) == 0
    assert (tmp_path / "data" / "dataset.json").read_bytes() == (prepared / "dataset.json").read_bytes()
    shutil.copytree(reference, run)
    shutil.rmtree(run / "checkpoints" / "step_00000020")
    (run / "checkpoints" / "latest").write_text("step_00000015\n")
    assert main(["train", str(recipe)]) == 0
    assert metrics(run) == metrics(reference)
    assert list(load_config(run / "config.yaml").data.sources) == ["python"]


def test_an_interrupted_run_goes_on_with_the_same_losses(reference, recipe, tmp_path, monkeypatch):
    """Interrupted in step 13, three steps after a checkpoint: metrics are cut and every line is as without it."""
    real = Engine.step

    def interrupted(self, batches, step, *flags, **others):
        if step == 13:
            raise RuntimeError("the machine went away")
        return real(self, batches, step, *flags, **others)

    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(RuntimeError, match="went away"):
        main(["train", str(recipe)])
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 12)
    assert "went away" in status["reason"]
    assert len(metrics(tmp_path / "run")) == 12
    monkeypatch.setattr(Engine, "step", real)
    assert main(["train", str(recipe)]) == 0
    assert metrics(tmp_path / "run") == metrics(reference)


def test_a_step_is_prepared_while_the_device_is_at_the_one_before(brief_recipe, tmp_path, monkeypatch):
    told = []

    def note(owner, name):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (told.append(name), real(*args))[1])

    for each in ((TrainingData, "next_step"), (TrainingData, "prepare"), (engine, "update"), (StepReport, "to_host")):
        note(*each)
    assert main(["train", str(brief_recipe), "train.steps=3", f"run.dir={tmp_path / 'prepared'}"]) == 0
    begun = ["next_step", "prepare", "update"]
    assert told == [*begun, "prepare", "to_host"] * 2 + [*begun, "to_host"]


@pytest.mark.slow
def test_torchrun_gives_the_same_losses(brief_reference, brief_recipe, tmp_path):
    """The way users start several processes, each from nothing; test_rank_death.py starts torchrun in every run."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
        *("-m", "megahybrid", "train", str(brief_recipe)),
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(metrics(tmp_path / "run"), metrics(brief_reference))


def test_generate_continues_a_prompt_the_same_way_twice(reference, capsys):
    outputs = []
    for _ in range(2):
        command = ["generate", str(reference), "--prompt", "def ", "--tokens", "40", "--seed", "3"]
        assert main(command) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("def ") and len(outputs[0]) > 20


def test_plan_counts_what_is_trained(recipe, reference, capsys):
    from safetensors.torch import load_file

    assert main(["plan", str(recipe)]) == 0
    weights = load_file(reference / "checkpoints" / "step_00000020" / "weights-00000.safetensors")
    total = sum(weight.numel() for weight in weights.values())
    assert f"{total:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "override", "reason"),
    [
        ("train", "data.path=/nowhere", "prepare"),
        ("train", "model.vocab_size=100", "vocabulary"),
        ("train", "model.patern=G", "did you mean model.pattern?"),
        ("train", "train.seq_length=128", "seq_length"),
        ("train", "data.validation_fraction=0.1", "another data.validation_fraction (0.2, now 0.1); set it back"),
        ("train", "parallel.tensor=2", "1 process cannot be split"),
        ("prepare", "data.sources.python.path=/nowhere", "/nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(verb, override, reason, recipe, tmp_path, capsys):
    data = [] if override.startswith("data.path") or verb == "train" else [f"data.path={tmp_path / 'data'}"]
    before = sorted(tmp_path.rglob("*"))
    assert main([verb, str(recipe), override, *data]) == 2
    captured = capsys.readouterr()
    assert reason in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_recipe_is_one_sentence_on_a_real_terminal(tmp_path):
    command = [sys.executable, "-m", "megahybrid", "train", "absent.yaml"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert "absent.yaml" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_resume_with_another_model_is_refused(reference, capsys):
    command = ["train", str(reference.parent / "recipe.yaml"), "train.steps=30", "model.hidden_size=64"]
    assert main(command) == 2
    assert "trained with model.hidden_size = 32, not 64" in capsys.readouterr().err


def test_a_changed_checkpoint_file_is_refused(recipe, tmp_path, capsys):
    assert main(["train", str(recipe), "train.steps=2"]) == 0
    file = tmp_path / "run" / "checkpoints" / "step_00000002" / "weights-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert main(["train", str(recipe), "train.steps=4"]) == 2
    assert "not what was saved" in capsys.readouterr().err
