"""Runs that learn from tasks, beside text and alone: the same in every layout, and through every command."""

import json

import pytest
import yaml

from megahybrid.cli import main
from megahybrid.config import load_config
from megahybrid.doctor import machine
from megahybrid.launch.checks import check_start
from tests.training.conftest import assert_same_run, metrics
from tests.training.test_layouts import Layout

TRAIN = "tests.training.test_layouts:train"
TASK = [
    "data.sources.recall.format=task",
    "data.sources.recall.task=selective_mqar",
    "data.sources.recall.weight=1",
    "data.sources.recall.stages=[{until: 9, length: 32, pairs: 3}, {pairs: 6, context_weight: 0.1}]",
]
# Few small steps: what is rounded otherwise comes to move a router's score over its edge, and a gradient by 1e-3.
BESIDE_TEXT = [
    *TASK,
    "data.sources.python.weight=1",
    "data.shuffle_block_size=12",
    "train.z_loss=0.001",
    "train.steps=6",
    "optimizer.learning_rate=0.002",
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, brief, text, prepared):
    """An uninterrupted run on one process."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "recipe.yaml").write_text(brief.format(run=folder / "run", data=prepared, text=text))
    assert main(["train", str(folder / "recipe.yaml"), *BESIDE_TEXT]) == 0
    return folder / "run"


@pytest.fixture
def alone(brief, tmp_path):
    """A recipe whose one source is a task; nothing is prepared for it."""
    recipe = yaml.safe_load(brief.format(run=tmp_path / "run", data="", text=""))
    recipe["data"] = {"sources": {"recall": {"format": "task"}}}
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(recipe))
    return [str(tmp_path / "alone.yaml"), *TASK, "optimizer.schedule=constant"]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(data=2, zero_stage=2),
        Layout(tensor=2, sequence=True),
        Layout(pipeline=2, virtual_pipeline=2),
        pytest.param(Layout(data=4), marks=pytest.mark.slow),
        pytest.param(Layout(pipeline=2, data=2), marks=pytest.mark.slow),
        pytest.param(Layout(tensor=2, data=2, zero_stage=3), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_losses_beside_text_do_not_depend_on_the_layout_or_on_a_stop(
    layout, workers, reference, brief_recipe, tmp_path
):
    """Stopped by SIGTERM in the middle of a stage and of a block, and gone on in the layout."""
    workers.run(1, "tests.training.test_layouts:train_and_stop", str(brief_recipe), 2, *BESIDE_TEXT)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["step"] == 2
    workers.run(layout.world, TRAIN, str(brief_recipe), *BESIDE_TEXT, *layout.overrides)
    assert_same_run(metrics(tmp_path / "run"), metrics(reference))


def test_a_run_of_tasks_alone_needs_nothing_prepared(alone, tmp_path, capsys):
    """It trains, goes on, and every command knows it: its text is numbers."""
    run = tmp_path / "run"
    for steps in (5, 8):
        assert main(["train", *alone, f"train.steps={steps}"]) == 0
    assert main(["train", *alone, "train.steps=8", f"run.dir={tmp_path / 'whole'}"]) == 0
    losses = [[line["loss"] for line in metrics(folder)] for folder in (run, tmp_path / "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    assert all(line.get("validation_loss") is None for line in metrics(run))
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "17 4 9", "--tokens", "3"]) == 0
    said = capsys.readouterr().out.split()
    assert said[:3] == ["17", "4", "9"] and all(word.isdigit() or "endoftext" in word for word in said)
    assert main(["generate", str(run), "--prompt", "seventeen"]) == 2
    assert "knows the numbers from 1 to 383" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "hf")]) == 0
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "imported")]) == 0
    assert main(["plan", *alone]) == 0 and main(["plot", str(run)]) == 0
    assert "held-out loss" in capsys.readouterr().out
    found = [finding.text for finding in machine.data(load_config(alone[0], alone[1:]))]
    assert found[0].startswith("data.identity is") and found[1] == "all sources are tasks, made while training"
    check_start(load_config(alone[0], [*alone[1:], "train.steps=9"]), nodes=1, gpus_per_node=2)
    assert main(["prepare", *alone]) == 2
