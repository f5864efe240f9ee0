import pytest

from megahybrid.config.schema import OptimizerConfig
from megahybrid.training.optimizer import learning_rate


def test_warmup_then_cosine():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, min_ratio=0.1)
    assert learning_rate(config, 1, 110) == pytest.approx(0.1)
    assert learning_rate(config, 5, 110) == pytest.approx(0.5)
    assert learning_rate(config, 10, 110) == pytest.approx(1.0)
    assert learning_rate(config, 60, 110) == pytest.approx(0.55)
    assert learning_rate(config, 110, 110) == pytest.approx(0.1)


def test_without_warmup_the_first_step_is_near_the_peak():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=0, min_ratio=0.0)
    assert learning_rate(config, 1, 100) == pytest.approx(2.0, rel=1e-3)
    assert learning_rate(config, 100, 100) == pytest.approx(0.0)


def test_wsd_rests_and_then_falls_linearly():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule="wsd", decay_fraction=0.2, min_ratio=0.1)
    found = [learning_rate(config, step, 100) for step in (5, 10, 50, 80, 90, 100)]
    assert found == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.55, 0.1])


def test_constant_rests_after_warmup():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule="constant")
    assert [learning_rate(config, step, 100) for step in (5, 10, 100)] == [0.5, 1.0, 1.0]
