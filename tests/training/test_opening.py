"""What a run says before its first step."""

from dataclasses import replace

import pytest

from megahybrid.config.schema import ParallelConfig
from megahybrid.parallel import groups
from megahybrid.scaling.plan import parameters_by_part
from megahybrid.training.opening import opening
from tests.model import tiny


def opening_of(parallel, warmup_steps):
    groups.initialize(parallel)
    config = tiny.config("GLS")
    optimizer = replace(config.optimizer, warmup_steps=warmup_steps)
    config = replace(config, parallel=parallel, optimizer=optimizer)
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


@pytest.mark.parametrize("parallel, layout", [
    ({"tensor": 2}, "tensor 2 × data 2, ZeRO 1"), ({"zero_stage": 3}, "data 4, ZeRO 3"),
    ({"context": 2, "pipeline": 2}, "context 2 × pipeline 2, ZeRO 1"),
])  # fmt: skip
def test_layouts(parallel, layout, workers):
    for _, (model, *_) in workers.run(4, "tests.training.test_opening:opening_of", ParallelConfig(**parallel), 0):
        assert f"; 4 processes, {layout}: " in model
