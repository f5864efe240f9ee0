"""Losses, gradients and updates where labels weigh unequally, in every kind of layout."""

import math

import pytest

from tests.training.test_engine import distance

ENGINE, AUTOGRAD = "tests.training.weighted_steps:by_engine", "tests.training.weighted_steps:by_autograd"
LAYOUTS = [
    {},
    {"data": 2},
    {"data": 2, "zero_stage": 2},
    {"data": 2, "zero_stage": 3},
    {"tensor": 2},
    {"tensor": 2, "sequence": True, "zero_stage": 2},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"tensor": 2, "data": 2, "sequence": True, "zero_stage": 3},
    {"context": 2},
    {"pipeline": 2, "data": 2},
    {"tensor": 2, "pipeline": 2, "sequence": True},
]


@pytest.fixture(scope="module")
def expected(workers):
    return workers.run(1, AUTOGRAD)[0]


def world(layout):
    return math.prod(layout.get(key, 1) for key in ("data", "tensor", "context", "pipeline"))


def possibly_slow(layout):
    name = "-".join(f"{key}={value}" for key, value in layout.items()) or "alone"
    return pytest.param(layout, id=name, marks=[pytest.mark.slow] * (world(layout) > 2))


@pytest.mark.parametrize("layout", map(possibly_slow, LAYOUTS))
def test_steps_are_those_of_a_masked_mean_over_the_global_batch(layout, workers, expected):
    parallel = {key: value for key, value in layout.items() if key != "data"}
    for rank in workers.run(world(layout), ENGINE, parallel):
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        assert rank["losses"][1] == 0  # no label counts
        assert rank["aux"] == pytest.approx(expected["aux"], rel=1e-5)
        assert rank["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        for ours, theirs in zip(rank["states"], expected["states"], strict=True):
            assert distance(ours["exp_avg"], theirs["exp_avg"]) < 1e-4
            assert distance(ours["exp_avg_sq"], theirs["exp_avg_sq"]) < 2e-4
            assert distance(ours["weights"], theirs["weights"]) < 1e-5


def test_the_expected_steps_have_every_part(expected):
    """Auxiliary losses count in steps without labels, too; weights of labels move what they should."""
    assert expected["losses"][0] > 1 and expected["losses"][1] == 0 and expected["losses"][2] > 1
    assert min(expected["aux"]) > 0.01 and min(expected["norms"]) > 1e-3
