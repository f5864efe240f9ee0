"""What ZeRO-3 splits and what it leaves whole."""

import itertools
from pathlib import Path

import pytest

from megahybrid.config import load_config
from megahybrid.scaling import memory, splitting
from megahybrid.scaling.parameters import parameter_specs, parameters_by_rank
from tests.scaling.test_memory import config_of

RECIPES = Path(__file__).parents[2] / "recipes"


def test_zero_3_leaves_so_much_whole_and_splits_the_rest_evenly():
    config = load_config(RECIPES / "lalte-8b.yaml", ["parallel.zero_stage=3"])
    split = splitting.split_matrices(config, 4)
    (count,) = parameters_by_rank(config)
    assert 0.8 * splitting.WHOLE < count - sum(split.values()) <= splitting.WHOLE
    gaps = [after - before for before, after in itertools.pairwise(split)]
    assert min(gaps) == 1 and max(gaps) == 2 and gaps.count(2) == 40 - len(split) - (39 not in split)
    config = load_config(RECIPES / "lalte-0.4b.yaml", ["parallel.zero_stage=3"])
    (count,) = parameters_by_rank(config)
    assert 0.5 * count <= sum(splitting.split_matrices(config, 4).values()) < 0.6 * count
    assert splitting.split_matrices(config, 1) == {}


def test_the_peak_with_zero_3_has_what_is_whole():
    config = config_of("GLGL", zero_stage=3)
    (count,) = parameters_by_rank(config)
    sizes = {n: sum(each.full_size for each in matrices_of(config, n)) for n in range(4)}
    passes, split = memory.activations(config, 4, 0), splitting.split_matrices(config, 4)
    assert split == {n: sizes[n] for n in split} and list(split) in ([0, 1, 2, 3], [0, 1, 2], [0, 2])
    whole = count - sum(split.values())
    assert whole <= count / 2 or len(split) == 4
    copies = (whole + sum(split.values()) / 4 + sum(sorted(split.values())[-2:])) * 2
    assert memory.peak_bytes(config, 4) == [pytest.approx(copies + count * (4 / 4 + 12 / 4) + passes)]
    start = (whole + sum(split.values()) / 4) * 2 + count * (4 / 4 + 12 / 4)
    assert memory.start_up(config, count, 4) == pytest.approx(start)  # no layer is gathered yet
    assert memory.peak_bytes(config, 1) == [pytest.approx(count * (2 + 4 + 12) + memory.activations(config, 1, 0))]


def matrices_of(config, layer):
    specs = parameter_specs(config).items()
    return [spec for name, spec in specs if name.startswith(f"layers.{layer}.") and len(spec.shape) > 1]
