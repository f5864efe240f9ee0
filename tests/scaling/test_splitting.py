"""What ZeRO-3 splits and what it leaves whole."""

import itertools
from pathlib import Path

from megahybrid.config import load_config
from megahybrid.scaling import splitting
from megahybrid.scaling.parameters import parameters_by_rank

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
