"""The same run in every layout of up to four processes, and resumed from one layout in another."""

import itertools
import json
import os
import re
import signal
from typing import NamedTuple

import pytest

from megahybrid.cli import main
from megahybrid.config import load_config
from megahybrid.config.validate import keepers
from tests.training.conftest import assert_same_run, metrics
from tests.training.retention import steps_alike


class Layout(NamedTuple):
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    sequence: bool = False
    data: int = 1
    zero_stage: int = 1
    context: int = 1

    @property
    def world(self):
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def overrides(self):
        micro_batch = max(1, 8 // self.data // (2 * self.pipeline))  # twice as many as stages for every replica
        parallel = [f"parallel.{key}={value}" for key, value in self._asdict().items() if key != "data"]
        return [*parallel, f"train.micro_batch_size={micro_batch}"]

    def __str__(self):
        parts = [f"tp{self.tensor}", f"pp{self.pipeline}", f"dp{self.data}", f"zero{self.zero_stage}"]
        parts += [f"cp{self.context}"] * (self.context > 1)
        return "-".join(parts + ["sp"] * self.sequence + [f"vp{self.virtual_pipeline}"] * (self.virtual_pipeline > 1))


POSSIBLE = [
    Layout(*each)
    for each in itertools.product((1, 2, 4), (1, 2, 4), (1, 2), (False, True), (1, 2, 4), (1, 2, 3))
    if each[0] * each[1] * each[4] <= 4  # processes
    and each[1] * each[2] <= 5  # layers of the tiny model
    and not (each[2] > 1 and each[1] == 1)
    and not (each[3] and each[0] == 1)
    and not (each[5] > 1 and each[1] > 1)
]
POSSIBLE += [
    Layout(context=2, zero_stage=2),
    Layout(context=4, zero_stage=3),
    Layout(context=4),
    Layout(context=2, data=2),
    Layout(context=2, data=2, zero_stage=3),
    Layout(context=2, tensor=2, sequence=True, zero_stage=2),
    Layout(context=2, pipeline=2),
    Layout(context=2, pipeline=2, virtual_pipeline=2),
]
# One of every kind, and pairs of kinds, those of the first resumes left out; --slow runs all.
REPRESENTATIVE = {
    Layout(data=4, zero_stage=2),
    Layout(data=2, zero_stage=3),
    Layout(tensor=4, sequence=True),
    Layout(tensor=2, data=2, zero_stage=3),
    Layout(tensor=2, sequence=True, data=2, zero_stage=2),
    Layout(pipeline=4),
    Layout(tensor=2, pipeline=2, virtual_pipeline=2),
    Layout(context=2, zero_stage=2),
}
RESUMES = [
    # These leave and enter every kind.
    (
        Layout(data=2),
        Layout(zero_stage=3),
        Layout(data=4),
        Layout(data=4, zero_stage=3),
        Layout(tensor=2, sequence=True, data=2, zero_stage=2),
    ),
    (
        Layout(tensor=2, zero_stage=2),
        Layout(pipeline=2, virtual_pipeline=2, data=2),
        Layout(tensor=2, pipeline=2, sequence=True),
        Layout(),
        Layout(tensor=4, sequence=True),
    ),
    # With --slow alone.
    (Layout(pipeline=4), Layout(tensor=2, data=2, zero_stage=3)),
    (Layout(tensor=2, data=2, zero_stage=3), Layout(pipeline=2, data=2)),
    (Layout(pipeline=2, virtual_pipeline=2), Layout(tensor=2, pipeline=2)),
    (Layout(tensor=4), Layout(pipeline=4)),
    (Layout(context=4), Layout()),
    (Layout(), Layout(context=2, zero_stage=3)),
]
SCORES_APART = 3e-6
"""Of retention scores in (-1/2, 1/2), which layouts round each otherwise."""


def train(recipe: str, *overrides: str, stop_after: int | None = None) -> None:
    """One rank of a run; the last rank gets SIGTERM before step `stop_after`, which all then finish and save."""
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


def possibly_slow(layout):
    return pytest.param(layout, id=str(layout), marks=[] if layout in REPRESENTATIVE else [pytest.mark.slow])


def test_the_runs_that_are_compared_have_everything_to_compare(brief_reference):
    """In both halves, between which runs stop and go on: lambda moves, and heads of both LTE layers evict."""
    lines = metrics(brief_reference)
    for half in (lines[: len(lines) // 2], lines[len(lines) // 2 :]):
        for key in ("lambda", "kept"):
            assert len({json.dumps(line[key]) for line in half}) > 1, key
    evicting = [[kept < 64 for kept in layer] for layer in lines[-1]["kept"]]
    assert all(any(layer) for layer in evicting) and sum(map(sum, evicting)) >= 5
    assert {0, 1} == {value for layer in lines[-1]["lambda"] for value in layer}
    assert len(list((brief_reference / "checkpoints").glob("step_*"))) == 2


@pytest.mark.parametrize("layout", [possibly_slow(layout) for layout in POSSIBLE])
def test_losses_do_not_depend_on_the_layout(layout, workers, brief_reference, brief_recipe, tmp_path):
    workers.run(layout.world, "tests.training.test_layouts:train", str(brief_recipe), *layout.overrides)
    assert_same_run(metrics(tmp_path / "run"), metrics(brief_reference))


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        pytest.param(Layout(data=2), "all", marks=pytest.mark.slow),
        (Layout(data=2, zero_stage=3), "all"),
        (Layout(tensor=2, sequence=True), "LG"),
        pytest.param(Layout(pipeline=2), "L", marks=pytest.mark.slow),
        pytest.param(Layout(context=2), "all", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_recompute_changes_nothing(layout, recompute, workers, brief_reference, brief_recipe, tmp_path):
    overrides = [*layout.overrides, f"train.recompute={recompute}"]
    workers.run(layout.world, "tests.training.test_layouts:train", str(brief_recipe), *overrides)
    assert_same_run(metrics(tmp_path / "run"), metrics(brief_reference))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [Layout(context=4, zero_stage=3), Layout(context=2, tensor=2, sequence=True), Layout(context=2, pipeline=2)],
    ids=str,
)
def test_layers_whose_tokens_stay_change_nothing(layout, workers, brief_recipe, tmp_path):
    """Of all kinds that can: of so many tokens LTE's, too, with a capped buffer.

    Of two scores that rounding parts one layout may keep the one and another the other: runs are compared up to there,
    the scores which decide so included.
    """
    # Three samples a micro-batch, whose borders are not those of context parallel ranks.
    same = ["model.lte.train_cap=true", "train.global_batch_size=6", "train.micro_batch_size=3"]
    overrides = [*layout.overrides, *same, "train.recompute=L"]
    config = load_config(brief_recipe, overrides)
    assert set("GLS") == set(keepers(config))
    recipe, train = str(brief_recipe), "tests.training.retention:train"
    (alone,) = workers.run(1, train, recipe, *same, f"run.dir={tmp_path / 'one'}")
    ranks = workers.run(layout.world, train, recipe, *overrides)
    until = steps_alike(ranks, alone, config.model.lte, 6 * 64, SCORES_APART)
    found, expected = metrics(tmp_path / "run"), metrics(tmp_path / "one")
    assert len(found) == len(expected) and until >= 8, f"rounding decided after {until} steps, with this seed after 8"
    assert_same_run(found[:until], expected[:until])


@pytest.mark.slow
def test_layers_that_need_all_tokens_exchange_them(workers, brief_recipe, tmp_path):
    """Of so many tokens and with a capped buffer LTE's would stay otherwise."""
    keys = "model.lte.gate=counterfactual"
    overrides = ["model.lte.train_cap=true", "train.global_batch_size=6", "train.micro_batch_size=3", "train.steps=4"]
    context = [*overrides, "parallel.context=2"]
    assert "L" in keepers(load_config(brief_recipe, context))
    assert "L" not in keepers(load_config(brief_recipe, [*context, keys]))
    train = "tests.training.test_layouts:train"
    workers.run(1, train, str(brief_recipe), *overrides, keys, f"run.dir={tmp_path / 'one'}")
    workers.run(2, train, str(brief_recipe), *context, keys)
    assert_same_run(metrics(tmp_path / "run"), metrics(tmp_path / "one"))


def train_with_little_room(recipe: str, *overrides: str) -> None:
    """One rank of a run in which LTE's tokens stay without a cap: from the second step on with room for a third, or on
    two ranks a sixth, of what is expected to be retained, and for twice that whenever it was too little."""
    from megahybrid.mixers.lte import LTEKind, controller

    part = 0.3 if "parallel.context=4" in overrides else 0.15
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LTEKind, "keeps_tokens", lambda *_: True)
        patch.setattr(controller, "most_room", lambda lte: 32)
        patch.setattr(controller, "room_for", lambda expected, sinks: round(part * expected))
        train(recipe, *overrides)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(context=4, zero_stage=3),
        pytest.param(Layout(context=2, tensor=2, sequence=True, zero_stage=2), marks=pytest.mark.slow),
        pytest.param(Layout(context=2, pipeline=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_step_for_which_there_was_no_room_is_done_again(layout, workers, brief_reference, brief_recipe, tmp_path):
    """And that is all that is seen of it."""
    overrides = [*layout.overrides, "train.micro_batch_size=1", "train.recompute=L"]
    workers.run(layout.world, "tests.training.test_layouts:train_with_little_room", str(brief_recipe), *overrides)
    again = re.findall(r"Step (\d+) is done again", (tmp_path / "run" / "logs" / "rank_00000.log").read_text())
    found = metrics(tmp_path / "run")
    assert again == [str(line["step"]) for line in found if line["repeated"]] == ["2", "3"]
    assert_same_run(found, metrics(brief_reference))


@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param(layouts, id="-".join(map(str, layouts)), marks=[pytest.mark.slow] * (number >= 2))
        for number, layouts in enumerate(RESUMES)
    ],
)
def test_a_run_goes_on_in_another_layout(layouts, workers, brief_reference, brief_recipe, tmp_path):
    """Stopped by SIGTERM to one rank, gone on in another layout, as often as there is one."""
    steps = len(metrics(brief_reference))
    for number, layout in enumerate(layouts, start=1):
        stop = steps * number // len(layouts)
        overrides = str(brief_recipe), stop, *layout.overrides
        workers.run(layout.world, "tests.training.test_layouts:train_and_stop", *overrides)
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        assert (status["state"], status["step"]) == ("stopped" if stop < steps else "done", stop)
    assert_same_run(metrics(tmp_path / "run"), metrics(brief_reference))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(data=3, zero_stage=2),
        Layout(data=4),
        Layout(data=4, zero_stage=3),
        Layout(pipeline=2, data=2),
        Layout(pipeline=2, data=4),
        Layout(pipeline=2, virtual_pipeline=2, data=3),
        Layout(context=4),
    ],
    ids=str,
)
def test_a_run_goes_on_in_its_own_layout_to_the_last_bit(layout, dtype, brief_recipe, tmp_path, workers):
    """With a tied embedding, of which a pipeline has two copies and a checkpoint one; and with as much room for what
    is retained as it came to be."""
    trained = "train_with_little_room" if layout.context > 1 else "train"
    keys = ["train.steps=6", "checkpoint.every=3", f"train.dtype={dtype}", *layout.overrides]
    keys += [f"train.global_batch_size={4 * layout.data}", "train.micro_batch_size=1", "model.tie_embeddings=true"]
    run, found = tmp_path / "run", []
    for back in ([], ["train.resume_from=3"]):
        workers.run(layout.world, f"tests.training.test_layouts:{trained}", str(brief_recipe), *keys, *back)
        files = sorted((run / "checkpoints" / "step_00000006").glob("*.safetensors"))
        found.append((metrics(run), [file.read_bytes() for file in files]))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2, sequence=True, data=2, zero_stage=2),
        pytest.param(Layout(pipeline=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_weights_alone_start_a_run_in_any_layout(layout, workers, brief_reference, brief_recipe, tmp_path):
    """As those of an imported model do."""
    weights = [f"train.init_from={brief_reference}", "train.steps=3", "checkpoint.every=3"]
    assert main(["train", str(brief_recipe), *weights, f"run.dir={tmp_path / 'alone'}"]) == 0
    workers.run(layout.world, "tests.training.test_layouts:train", str(brief_recipe), *weights, *layout.overrides)
    assert_same_run(metrics(tmp_path / "run"), metrics(tmp_path / "alone"))
