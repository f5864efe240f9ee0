"""Branches of a trunk: equal to runs from scratch of their length to the last bit, and runs of their own."""

import errno
import json
import os
import shutil
import signal

import pytest

from megahybrid.cli import main
from megahybrid.config import load_config
from megahybrid.config.branching import decay_start
from megahybrid.config.schema import OptimizerConfig
from megahybrid.data.loader import TrainingData
from megahybrid.training import loop, saver
from megahybrid.training.optimizer import learning_rate
from megahybrid.training.report import mean_tokens_per_second, summarise
from megahybrid.training.run_directory import read_metrics
from tests.training.conftest import RECIPE, metrics

# Branches begin between two moves of the controller; the router drops out, and documents do not see each other.
KEYS = [
    *("optimizer.schedule=wsd", "optimizer.learning_rate=0.02", "optimizer.warmup_steps=2"),
    *("model.lte.loss.update_interval=4", "model.lte.dropout=0.3", "train.validate_every=3"),
    *("evaluate.every=4", "evaluate.probes=[position,gain,kept]", "evaluate.samples=4", "checkpoint.every=100"),
]
TRUNK, LONG, SHORT = 15, 12, 8
"""Steps of the trunk and of its branches, which begin after step 10 and step 6."""


def train(recipe, run, *overrides):
    return main(["train", str(recipe), f"run.dir={run}", *KEYS, *overrides])


def train_rank(recipe, *overrides):
    loop.train(load_config(recipe, [*KEYS, *overrides]))


@pytest.fixture(scope="module")
def trunk(tmp_path_factory, text, prepared):
    folder = tmp_path_factory.mktemp("branches")
    (folder / "recipe.yaml").write_text(RECIPE.format(run=folder / "run", data=prepared, text=text))
    steps = [f"train.steps={TRUNK}", "checkpoint.milestones=[6,10]"]
    assert train(folder / "recipe.yaml", folder / "trunk", *steps) == 0
    return folder / "trunk"


def tensors(run, step):
    """The bytes of weights and moments, and the regulators' and the guard's state."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    facts = json.loads((folder / "checkpoint.json").read_text())
    files = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert len(files) >= 3
    return files, facts["regulators"], facts["guard"], facts["position"]["consumed"]


def assert_same(branch, scratch, begins, steps):
    found, expected = metrics(branch), metrics(scratch)
    assert [line["step"] for line in found] == list(range(begins + 1, steps + 1))
    assert found == expected[begins:]
    assert {"validation_loss", "probe_position_loss", "lambda", "retention_loss"} <= found[-1].keys()
    assert tensors(branch, steps) == tensors(scratch, steps)


def test_branches_are_the_runs_from_scratch(recipe, trunk, tmp_path):
    """Between two moves of the controller, each of which has one to come."""
    trained = TRUNK
    for steps, begins in ((LONG, 10), (SHORT, 6)):
        branch, scratch = tmp_path / f"branch-{steps}", tmp_path / f"scratch-{steps}"
        assert train(recipe, branch, f"train.steps={steps}", f"train.branch_from={trunk}@{begins}") == 0
        assert train(recipe, scratch, f"train.steps={steps}") == 0
        assert_same(branch, scratch, begins, steps)
        trained += len(metrics(branch))
    assert trained == TRUNK + round(0.2 * LONG) + round(0.2 * SHORT)
    assert metrics(trunk)[:10] == metrics(tmp_path / "scratch-12")[:10]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_branches_are_the_runs_from_scratch_in_other_layouts(stage, world, recipe, workers, tmp_path):
    run = (world, "tests.training.test_branches:train_rank", str(recipe), f"parallel.zero_stage={stage}")
    trunk, branch, scratch = (tmp_path / name for name in ("trunk", "branch", "scratch"))
    workers.run(*run, f"run.dir={trunk}", f"train.steps={TRUNK}", "checkpoint.milestones=[10]")
    workers.run(*run, f"run.dir={branch}", f"train.steps={LONG}", f"train.branch_from={trunk}@10")
    workers.run(*run, f"run.dir={scratch}", f"train.steps={LONG}")
    assert_same(branch, scratch, 10, LONG)


def test_a_branch_goes_on_by_itself(recipe, trunk, tmp_path, monkeypatch):
    """Ended before it has a checkpoint it begins again; stopped, it goes on with its trunk gone. Its W&B run is new."""
    began, real, copy, run = [], TrainingData.next_step, tmp_path / "copy", tmp_path / "run"
    shutil.copytree(trunk, copy)
    facts = copy / "checkpoints" / "step_00000006" / "checkpoint.json"
    facts.write_text(facts.read_text().replace('"tracking_id": null', '"tracking_id": "trunks"'))
    command = [f"train.steps={LONG}", f"train.branch_from={copy}@6", "optimizer.schedule=constant"]

    class Tracker(loop.Tracker):
        def __init__(self, config, run_id, step):
            began.append((run_id, step))
            super().__init__(config, run_id, step)

    def ends_in(step, how):
        def next_step(self):
            if self.consumed == 8 * (step - 1):
                how()
            return real(self)

        monkeypatch.setattr(TrainingData, "next_step", next_step)

    def fail():
        raise RuntimeError("the machine went away")

    monkeypatch.setattr(loop, "Tracker", Tracker)
    ends_in(8, fail)
    with pytest.raises(RuntimeError):
        train(recipe, run, *command)
    assert [line["step"] for line in metrics(run)] == [7] and not list((run / "checkpoints").glob("step_*"))
    ends_in(9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(recipe, run, *command) == 0
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    shutil.rmtree(copy)
    monkeypatch.setattr(TrainingData, "next_step", real)
    assert train(recipe, run, *command) == 0
    assert began == [(None, 0), (None, 0), (None, 9)]
    whole = tmp_path / "whole"
    assert train(recipe, whole, *command[:1], command[2], f"train.branch_from={trunk}@6") == 0
    assert metrics(run) == metrics(whole)
    assert [line["step"] for line in metrics(run)] == list(range(7, LONG + 1))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_00000009", "step_00000012"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.branch_from=/nowhere@6"], "there is no run '/nowhere'; give the directory of a run."),
        (["train.branch_from={trunk}@7"], "has no checkpoint of that step; it has 6, 10, 15."),
        (
            ["train.branch_from={trunk}"],
            "write RUN@STEP, the directory of a run and the step of one of its",
        ),
        (["train.branch_from={trunk}@10", "train.init_from={trunk}"], "train.init_from and train.branch_from are both"),
        (["train.branch_from={trunk}@10", "train.steps=10"], "begins at step 10 of train.steps = 10"),
        (["train.branch_from={run}@10"], "names run.dir '{run}' itself; give a new one, or go back with"),
        (["train.branch_from={trunk}@10", "train.seed=7"], "train.seed = 42, not 7; set it back, or start with train."),
        (["train.branch_from={trunk}@10", "model.pattern=GLSF"], "with model.pattern = GLSFL, not GLSF; set it back"),
        (
            ["train.branch_from={trunk}@10", "data.path={data}", "data.validation_fraction=0.4"],
            "than '{data}' holds; set it back, or prepare with data.",
        ),
        (
            [
                *("train.branch_from={trunk}@10", "data.path={data}", "data.validation_fraction=0.4"),
                "train.branch_data=own",
            ],
            "was trained with another tokenizer than '{data}' holds; prepare with data.tokenizer='{trunk}/checkpoints/",
        ),
        (["train.branch_from={trunk}@10", "train.branch_data=own", "train.seed=7"], "train.seed = 42, not 7; set it"),
        (
            ["train.branch_from={trunk}@10", "data.path={data}", "train.branch_data=own"],
            "was prepared with another data.validation_fraction (0.4, now 0.2); set it back, or prepare into another",
        ),
        (
            ["train.branch_from={trunk}@10", "data.validation_fraction=0.4"],
            "was prepared with another data.validation_fraction (0.2, now 0.4); set it back, or prepare into another",
        ),
        (["train.branch_data=own"], "train.branch_data is own, but the run is no branch; give train.branch_from,"),
        (["checkpoint.milestones=[6,21]"], "checkpoint.milestones has 21, which a run of train.steps = 20 does not"),
        (["checkpoint.milestones=[0]"], "checkpoint.milestones is [0]; it must be greater than 0."),
    ],
)
def test_what_no_branch_begins_with(overrides, said, recipe, trunk, text, tmp_path, capsys):
    """One sentence, and nothing is written."""
    places = {"trunk": trunk, "run": tmp_path / "run", "data": tmp_path / "data"}
    if any("{data}" in each for each in overrides):
        keys = ["data.validation_fraction=0.4", f"data.path={places['data']}"]
        assert main(["prepare", str(recipe), *keys]) == 0
    capsys.readouterr()
    assert main(["train", str(recipe), *(each.format(**places) for each in overrides)]) == 2
    error = capsys.readouterr().err
    assert said.format(**places) in error and error.count("\n") == 1
    assert not places["run"].exists()


def test_a_branch_with_data_of_its_own_reads_it_from_the_first_sample(recipe, trunk, text, tmp_path, monkeypatch):
    """Weights, moments and step go on; the data is that of a run from scratch, with the trunk's tokenizer; stopped, it
    goes on as if it had not been."""
    own, seen = tmp_path / "own", {}
    tokenizer = trunk / "checkpoints" / "step_00000010" / "tokenizer.json"
    data = [
        *(f"data.path={own}", f"data.tokenizer={tokenizer}", "data.validation_fraction=0.3"),
        *(f"data.sources.other={{path: {text}, include: [c*.py], weight: 3}}", "data.sources.python.weight=1"),
    ]
    assert main(["prepare", str(recipe), *data]) == 0
    real = TrainingData.next_step

    def next_step(self):
        batches = real(self)
        seen.setdefault(run.name, []).append([batch.tokens.tolist() for batch in batches])
        return batches

    monkeypatch.setattr(TrainingData, "next_step", next_step)
    command = ["train.branch_data=own", f"train.branch_from={trunk}@10", f"train.steps={LONG + 2}"]
    for name, keys in (("branch", command), ("scratch", ["train.steps=4"]), ("whole", command)):
        run = tmp_path / name
        if name == "branch":
            assert train(recipe, run, *data, *command, "checkpoint.milestones=[12]") == 0
            shutil.rmtree(run / "checkpoints" / "step_00000014")
            (run / "checkpoints" / "latest").write_text("step_00000012\n")
            del seen[name][2:]
        assert train(recipe, run, *data, *keys) == 0
    assert seen["branch"] == seen["scratch"] == seen["whole"] and len(seen["whole"]) == 4
    assert metrics(tmp_path / "branch") == metrics(tmp_path / "whole")
    assert [line["step"] for line in metrics(tmp_path / "whole")] == [11, 12, 13, 14]
    assert tensors(tmp_path / "whole", 14)[3] == 4 * 8
    first, trunks = metrics(tmp_path / "whole")[0], metrics(trunk)
    assert first["loss"] < trunks[0]["loss"] - 0.5 and first["learning_rate"] == trunks[10 - 1]["learning_rate"]


def test_a_branch_anneals_without_its_trunks_source(trunk, text, tmp_path, capsys):
    """A recipe that includes the trunk's own configuration and removes what that was trained on."""
    recipe, run = tmp_path / "anneal.yaml", tmp_path / "run"
    tokenizer = trunk / "checkpoints" / "step_00000010" / "tokenizer.json"
    recipe.write_text(
        f"include: {trunk / 'config.yaml'}\n"
        f"data: {{path: {tmp_path / 'data'}, tokenizer: {tokenizer}, validation_fraction: 0.3, sources: "
        f"{{python: null, other: {{path: {text}, include: [c*.py], weight: 1}}}}}}\n"
    )
    assert main(["prepare", str(recipe)]) == 0
    command = [f"train.branch_from={trunk}@10", "train.steps=11"]
    assert train(recipe, run, *command) == 2
    assert "other data takes train.branch_data=own" in capsys.readouterr().err
    assert train(recipe, run, *command, "train.branch_data=own") == 0
    assert [line["step"] for line in metrics(run)] == [11]
    assert list(load_config(run / "config.yaml").data.sources) == ["other"]


def test_wsd_does_not_know_its_length_before_its_decay():
    """Rates are equal to the last bit up to the start of the decay, whatever the fraction and the length."""
    for fraction in (0.1, 0.15, 0.2, 0.3, 1 / 3, 0.35):
        config = OptimizerConfig(learning_rate=3e-3, warmup_steps=5, schedule="wsd", decay_fraction=fraction)
        for steps in range(20, 400, 7):
            start = decay_start(config, steps)
            assert abs(steps - start - fraction * steps) <= 0.5 + 1e-9
            assert [learning_rate(config, step, steps) for step in range(1, start + 1)] == [
                learning_rate(config, step, 10 * steps) for step in range(1, start + 1)
            ]
            falling = [learning_rate(config, step, steps) for step in range(start, steps + 1)]
            assert falling == sorted(set(falling), reverse=True)
            assert falling[-1] == pytest.approx(0.1 * config.learning_rate)


def test_what_is_said_of_a_branch(recipe, trunk, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train", str(recipe), f"train.steps={SHORT}", f"train.branch_from={trunk}@6"]
    assert main(command) == 0
    lines = read_metrics(run)
    times = [512 / line["tokens_per_second"] for line in lines]
    assert mean_tokens_per_second(lines) == pytest.approx(2 * 512 / sum(times))
    assert "tokens trained         4,096 in 8 steps\nof these by its trunk  3,072 in 6 steps" in summarise(run)
    assert main(["runs", str(run)]) == 0
    assert "8/8" in capsys.readouterr().out


def test_milestones_stay(recipe, tmp_path, monkeypatch):
    """Whatever `every`, `keep` and the disk, through a step back, and when the run gets more steps."""
    real, refusals = saver.write_tensors, iter([errno.ENOSPC])
    keys = ["checkpoint.milestones=[2,3]", "checkpoint.every=5", "checkpoint.keep=1", "train.validation_samples=2"]

    def refuses_once(file, tensors):
        if "step_00000003" in str(file) and (fault := next(refusals, None)):
            raise OSError(fault, os.strerror(fault))
        return real(file, tensors)

    def train(*overrides):
        assert main(["train", str(recipe), *keys, *overrides]) == 0
        return sorted(int(path.name.removeprefix("step_")) for path in tmp_path.glob("run/checkpoints/step_*"))

    monkeypatch.setattr(saver, "write_tensors", refuses_once)
    for name in ("_SECONDS_AT_ONCE", "_SECONDS_BETWEEN_LAST_TRIES"):
        monkeypatch.setattr(saver, name, 0.0)
    assert train("train.steps=4") == [2, 3, 4]
    assert next(refusals, None) is None
    assert train("train.steps=6") == [2, 3, 6]
    assert train("train.steps=4", "train.resume_from=2") == [2, 3, 4]
