import json
import os
import shutil
from pathlib import Path

import pytest

from megahybrid.cli import main

RECIPE = """
run: {{dir: {run}}}
model:
  pattern: GLSFL
  hidden_size: 32
  intermediate_size: 48
  vocab_size: 384
  gdn: {{num_heads: 4, head_dim: 8}}
  attention: {{num_heads: 4, head_dim: 8, window_size: 24}}
  lte: {{window_size: 15, buffer_size: 8, sink_size: 2, loss: {{update_interval: 2, initial: 1.0}}}}
train: {{seq_length: 64, micro_batch_size: 2, global_batch_size: 8, steps: 20, dtype: fp32,
         validation_samples: 6, log_every: 1}}
optimizer: {{learning_rate: 0.005, warmup_steps: 4, eps: 1.0e-8}}
data:
  path: {data}
  validation_fraction: 0.2
  sources: {{python: {{path: {text}, include: ["*.py"]}}}}
checkpoint: {{every: 5, keep: 2}}
tracking: {{wandb: disabled}}
"""


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder of real text: some small modules of the standard library."""
    folder = tmp_path_factory.mktemp("text")
    library = Path(os.__file__).parent
    for name in ("abc", "bisect", "chunk", "code", "colorsys", "copy", "heapq", "keyword", "queue", "sched", "shlex"):
        source = library / f"{name}.py"
        if source.exists():
            shutil.copy(source, folder)
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, text):
    """A data folder that `prepare` has filled."""
    folder = tmp_path_factory.mktemp("prepared")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(run=folder / "run", data=folder / "data", text=text))
    assert main(["prepare", str(recipe)]) == 0
    return folder / "data"


@pytest.fixture
def recipe(tmp_path, text, prepared):
    """A tiny recipe with all four mixers on prepared data, its run directory in tmp_path / "run"."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(run=tmp_path / "run", data=prepared, text=text))
    return path


@pytest.fixture(scope="session")
def reference(tmp_path_factory, text, prepared):
    """An uninterrupted run of 20 steps on one process."""
    return run_alone(tmp_path_factory.mktemp("reference"), RECIPE, text, prepared)


@pytest.fixture(scope="session")
def brief(pytestconfig):
    """The recipe of runs that are compared in many layouts: with --slow of the usual 20 steps, else of 8.

    They take four times the learning rate, so that as many heads come to evict (test_layouts.py sees to it). Adam's
    epsilon is far above the rounding of a gradient (1e-9): with 1e-8 a weight whose first gradient was 1.5e-8 had a
    first step that layouts rounded up to 9e-6 apart, and with it gradient norms of later steps 1e-5.
    """
    recipe = RECIPE.replace("eps: 1.0e-8", "eps: 1.0e-5")
    if pytestconfig.getoption("--slow"):
        return recipe
    return recipe.replace("steps: 20", "steps: 8").replace("learning_rate: 0.005", "learning_rate: 0.02")


@pytest.fixture
def brief_recipe(brief, tmp_path, text, prepared):
    """As `recipe`, of as many steps as `brief` has."""
    path = tmp_path / "recipe.yaml"
    path.write_text(brief.format(run=tmp_path / "run", data=prepared, text=text))
    return path


@pytest.fixture(scope="session")
def brief_reference(tmp_path_factory, brief, text, prepared):
    """An uninterrupted run of `brief` on one process."""
    return run_alone(tmp_path_factory.mktemp("brief"), brief, text, prepared)


def run_alone(folder: Path, recipe: str, text: Path, prepared: Path) -> Path:
    (folder / "recipe.yaml").write_text(recipe.format(run=folder / "run", data=prepared, text=text))
    assert main(["train", str(folder / "recipe.yaml")]) == 0
    return folder / "run"


def metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl without what depends on time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for key in ("tokens_per_second", "data_seconds", "checkpoint_seconds", "probe_seconds"):
            line.pop(key, None)
    return lines


def assert_same_run(found: list[dict], expected: list[dict]) -> None:
    """fp32 losses within 2e-6 relative, gradient norms within 1e-5, lambda and kept counts equal."""
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-6), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5), ours["step"]
        assert ours["lambda"] == theirs["lambda"], ours["step"]
        assert ours["kept"] == theirs["kept"], ours["step"]
        if "validation_loss" in theirs:
            assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=2e-6), ours["step"]
