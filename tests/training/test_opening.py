"""What a run says before its first step."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megahybrid.config.schema import ParallelConfig
from megahybrid.parallel import groups
from megahybrid.scaling.plan import parameters_by_part
from megahybrid.training.opening import opening, rate_jump, unvalidated
from tests.model import tiny


def opening_of(parallel, warmup_steps, cuda_graph=False):
    groups.initialize(parallel)
    config = tiny.config("GLS")
    optimizer = replace(config.optimizer, warmup_steps=warmup_steps)
    train = replace(config.train, cuda_graph=cuda_graph)
    config = replace(config, parallel=parallel, optimizer=optimizer, train=train)
    return config, opening(config)


@pytest.fixture
def process_group():
    yield
    groups.shut_down()


def test_one_process(process_group):
    config, (model, length) = opening_of(ParallelConfig(), 0)
    assert model.startswith(f"GLS: {sum(parameters_by_part(config).values()) / 1e3:.3g}K parameters, fp32; 1 process: ")
    assert length == "1 steps of 64 tokens, 64 in all; unused"


def test_a_warm_up_as_long_as_the_run_is_said(process_group):
    _, lines = opening_of(ParallelConfig(), 1)
    assert lines[2].startswith("optimizer.warmup_steps (1) leaves nothing of train.steps (1)")


def test_that_nothing_will_be_recorded_is_said(process_group):
    _, lines = opening_of(ParallelConfig(zero_stage=3), 0, cuda_graph=True)
    assert lines[2].startswith("train.cuda_graph records nothing here: it is for one process")
    groups.shut_down()
    _, lines = opening_of(ParallelConfig(), 0, cuda_graph=True)
    assert len(lines) == 2


@pytest.mark.parametrize("parallel, layout", [
    ({"tensor": 2}, "tensor 2 × data 2, ZeRO 1"), ({"zero_stage": 3}, "data 4, ZeRO 3"),
    ({"context": 2, "pipeline": 2}, "context 2 × pipeline 2, ZeRO 1"),
])  # fmt: skip
def test_layouts(parallel, layout, workers):
    for _, (model, *_) in workers.run(4, "tests.training.test_opening:opening_of", ParallelConfig(**parallel), 0):
        assert f"; 4 processes, {layout}: " in model


def test_a_branch_whose_rate_jumps_says_so():
    def of(steps, schedule="wsd"):
        config = tiny.config("GLS")
        optimizer = replace(config.optimizer, schedule=schedule, warmup_steps=2, learning_rate=1e-3)
        return replace(config, optimizer=optimizer, train=replace(config.train, steps=steps))

    trunk = of(60)  # it decays from step 48 on
    assert rate_jump(trunk, of(50), 40) is None and rate_jump(trunk, of(70), 48) is None
    for steps, step, before, here in ((45, 40, "0.001", "0.0006"), (65, 60, "0.0001", "0.000446")):
        said = rate_jump(trunk, of(steps), step)
        assert said.startswith(f"At step {step} the trunk's learning rate was {before}, this run's is {here} there")
        assert f"decays from step 48 on, this run from step {round(0.8 * steps)}; a branch from before both" in said
    assert rate_jump(trunk, of(60, "cosine"), 40).endswith("it jumps.")
    half = of(60)
    half.optimizer.learning_rate /= 2
    assert rate_jump(trunk, half, 40).endswith("this run's is 0.0005 there: it jumps.")  # wherever it begins


NONE = "Nothing is held out of the prepared text: there is no validation."
NO_DOC = "Validation is without doc, of which nothing is held out."
NO_CODE = (
    "Validation is without code: train.validation_samples (4) is too small to have a sample of each source; raise it."
)


@pytest.mark.parametrize(
    ("held", "unread", "said"),
    [
        ({}, [], [NONE]),
        ({"code": 7}, [], [NO_DOC]),
        ({"code": 7, "doc": 9}, [], []),
        ({"code": 7, "doc": 99}, ["code"], [NO_CODE]),
        ({"code": 7, "web": 99}, ["code"], [NO_DOC, NO_CODE]),
    ],
)
def test_text_that_no_validation_reads_is_said(held, unread, said, monkeypatch):
    weights = {"code": 1.0, "doc": 1.0}
    monkeypatch.setattr("megahybrid.training.opening.text_weights", lambda config, prepared: weights)
    validation = SimpleNamespace(ends=held, unread=unread, samples=max(held.values(), default=0))
    config = SimpleNamespace(train=SimpleNamespace(validation_samples=4))
    assert unvalidated(SimpleNamespace(prepared=object()), validation, config) == said
    assert unvalidated(SimpleNamespace(prepared=None), validation, config) == []
