"""The same run on 1, 2 and 4 ranks with ZeRO 1, 2 and 3, and resumed from any of them on any other."""

import os
import signal

import pytest

from tests.training.conftest import assert_same_run, metrics
from tests.workers import Workers

LAYOUTS = [(world, stage) for world in (1, 2, 4) for stage in (1, 2, 3)]
RESUMES = [((2, 1), (1, 3)), ((1, 3), (4, 1)), ((4, 3), (2, 2)), ((2, 2), (2, 3))]


@pytest.fixture(scope="module")
def workers():
    pool = Workers(4)
    yield pool
    pool.close()


def train(recipe: str, *overrides: str, stop_after: int | None = None) -> None:
    """One rank of a run; the last rank gets SIGTERM before step `stop_after`, which all then finish and save."""
    from megahybrid.config import load_config
    from megahybrid.data.loader import TrainingData
    from megahybrid.training.loop import train

    real = TrainingData.next_step

    def next_step(self):
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if stop_after and rank == world - 1 and self.consumed == 8 * (stop_after - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self)

    TrainingData.next_step = next_step
    try:
        train(load_config(recipe, overrides))
    finally:
        TrainingData.next_step = real


def train_and_stop(recipe: str, stop_after: int, *overrides: str) -> None:
    train(recipe, *overrides, stop_after=stop_after)


@pytest.mark.parametrize(("world", "stage"), LAYOUTS)
def test_losses_do_not_depend_on_the_layout(world, stage, workers, reference, recipe, tmp_path):
    overrides = [f"parallel.zero_stage={stage}", f"train.micro_batch_size={1 if stage == 2 else 2}"]
    workers.run(world, "tests.training.test_layouts:train", str(recipe), *overrides)
    assert_same_run(metrics(tmp_path / "run"), metrics(reference))


@pytest.mark.parametrize("stage", [1, 3])
def test_recompute_changes_nothing(stage, workers, reference, recipe, tmp_path):
    overrides = [f"parallel.zero_stage={stage}", "train.recompute=all"]
    workers.run(2, "tests.training.test_layouts:train", str(recipe), *overrides)
    assert_same_run(metrics(tmp_path / "run"), metrics(reference))


@pytest.mark.parametrize(("before", "after"), RESUMES)
def test_a_run_goes_on_in_another_layout(before, after, workers, reference, recipe, tmp_path):
    """Stopped by SIGTERM to one rank in step 10, gone on with other ranks and another ZeRO stage."""
    import json

    at = "tests.training.test_layouts:train_and_stop", str(recipe), 10, f"parallel.zero_stage={before[1]}"
    workers.run(before[0], *at)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("stopped", 10)
    workers.run(after[0], "tests.training.test_layouts:train", str(recipe), f"parallel.zero_stage={after[1]}")
    assert_same_run(metrics(tmp_path / "run"), metrics(reference))
