"""The loss of held-out samples, of all and of each source."""

import pytest

from megahybrid.cli import main
from megahybrid.config import load_config
from megahybrid.data import validation_batches
from megahybrid.training import loop
from megahybrid.training.report import summarise
from tests.training.conftest import RECIPE, metrics

SOURCES = """{{
    python: {{path: {text}, include: ["[a-c]*.py"], weight: 1}},
    other: {{path: {text}, include: ["[d-z]*.py"], weight: 2}},
  }}"""
KEYS = ["train.steps=1", "optimizer.learning_rate=1e-12", "train.validation_samples=1000"]


def train_rank(recipe, *overrides):
    loop.train(load_config(recipe, overrides))


@pytest.fixture(scope="module")
def two(tmp_path_factory, text):
    """A recipe of two sources, each with held-out samples, and its run's only line."""
    folder = tmp_path_factory.mktemp("two")
    recipe, one = folder / "recipe.yaml", '{{python: {{path: {text}, include: ["*.py"]}}}}'
    assert one in RECIPE
    written = RECIPE.replace(one, SOURCES).replace("validation_fraction: 0.2", "validation_fraction: 0.4")
    recipe.write_text(written.format(run=folder / "run", data=folder / "data", text=text))
    assert main(["prepare", str(recipe)]) == 0
    assert main(["train", str(recipe), *KEYS]) == 0
    (line,) = metrics(folder / "run")
    return recipe, line


def test_of_each_source_it_is_that_of_a_run_of_it_alone(two, tmp_path):
    """Weights stay as they are at first, and all held-out samples are read."""
    recipe, line = two
    names = {"python": "other", "other": "python"}
    assert {key for key in line if "validation" in key} == {"validation_loss", *(f"validation_loss_{x}" for x in names)}
    for name, left_out in names.items():
        run = tmp_path / name
        alone = [*KEYS, f"data.sources.{left_out}.weight=0", f"run.dir={run}"]
        assert main(["train", str(recipe), *alone]) == 0
        (found,) = metrics(run)
        assert {key for key in found if "validation" in key} == {"validation_loss"}
        assert found["validation_loss"] == pytest.approx(line[f"validation_loss_{name}"], rel=1e-6)
    low, high = sorted(line[f"validation_loss_{name}"] for name in names)
    assert low < line["validation_loss"] < high and high - low > 1e-4
    said = summarise(recipe.parent / "run")
    assert f"{line['validation_loss_python']:.4f} nats a token" in said


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_sources_border_is_inside_a_micro_batch(replicas, two):
    """Or the other tests would not see whether the losses of a micro-batch are told apart: then choose other files."""
    recipe, _ = two
    split = []
    for rank in range(replicas):
        with validation_batches(load_config(recipe, KEYS), rank, replicas) as data:
            border, _ = data.ends.values()
            split += [batch.samples.min() < border <= batch.samples.max() for batch in data]
    assert any(split)


@pytest.mark.parametrize(
    "layout",
    [
        "parallel.context=2",
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "parallel.zero_stage=1",
        "parallel.zero_stage=3",
    ],
)
def test_it_is_the_same_in_other_layouts(layout, two, workers, tmp_path):
    recipe, line = two
    workers.run(2, "tests.training.test_validation:train_rank", str(recipe), *KEYS, layout, f"run.dir={tmp_path}/run")
    (found,) = metrics(tmp_path / "run")
    for key in ("validation_loss", "validation_loss_python", "validation_loss_other"):
        assert found[key] == pytest.approx(line[key], rel=2e-6)


def test_a_source_of_which_no_sample_is_read_is_named(two, tmp_path, capsys):
    recipe, line = two
    sources = {key.removeprefix("validation_loss_") for key in line if key.startswith("validation_loss_")}
    assert main(["train", str(recipe), *KEYS, "train.validation_samples=1", f"run.dir={tmp_path / 'run'}"]) == 0
    (found,) = metrics(tmp_path / "run")
    (unread,) = (name for name in sources if f"validation_loss_{name}" not in found)
    assert capsys.readouterr().out.count(f"Validation is without {unread}: train.validation_samples (1) is") == 1
