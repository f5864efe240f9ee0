import itertools
import random

import pytest

from megahybrid.config import load_config
from megahybrid.scaling.stages import balanced, layer_costs, stage_layers


def test_balanced_is_the_best_of_all_splits():
    generator = random.Random(0)
    for _ in range(50):
        costs = [generator.randint(1, 9) for _ in range(generator.randint(1, 8))]
        parts = generator.randint(1, len(costs))
        ranges = balanced(costs, parts)
        assert [number for each in ranges for number in each] == list(range(len(costs)))
        assert len(ranges) == parts and all(ranges)
        splits = itertools.combinations(range(1, len(costs)), parts - 1)
        best = min(max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cuts, len(costs)))) for cuts in splits)
        assert max(sum(costs[each.start : each.stop]) for each in ranges) == best


def test_the_last_stage_holds_fewer_layers_for_the_output_layer():
    config = load_config("recipes/lalte-0.4b.yaml", ["parallel.pipeline=4"])
    sizes = [len(each) for each in stage_layers(config)]
    assert sum(sizes) == 24 and sizes[-1] < min(sizes[:-1])


def test_stages_are_balanced_by_measured_time():
    """By FLOPs the output layer of 1.4B is 1.14 layers; it takes the time of 0.83."""
    config = load_config("recipes/lalte-1.4b.yaml", ["parallel.pipeline=4"])
    assert [len(each) for each in stage_layers(config)] == [6] * 4
    costs = layer_costs(config)
    assert (costs[-1] - costs[-3]) / costs[-4] == pytest.approx(1.14 * 0.494 / 0.62, rel=0.05)


def test_bars_in_the_pattern_say_where_stages_begin():
    config = load_config(
        "recipes/lalte-0.4b.yaml", ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.pattern=GL|G|GL|LGG"]
    )
    assert stage_layers(config) == [range(2), range(2, 3), range(3, 5), range(5, 8)]
    config.parallel.pipeline = config.parallel.virtual_pipeline = 1
    assert stage_layers(config) == [range(8)]
