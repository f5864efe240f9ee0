"""What compute buys, against searches."""

import dataclasses

import numpy as np
import pytest

from megahybrid.study.law.frontier import Frontier, TokenCost, multiplier
from tests.study import tables

COSTS = (TokenCost(), TokenCost(20.0, 0.94))
GRID = np.geomspace(1e5, 1e13, 400_001)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("flops", [1e17, 1e24])
def test_the_best_size_is_that_of_a_search(cost, flops):
    losses = tables.LAW.loss(GRID, flops / cost(GRID))
    best = losses.argmin()
    frontier = Frontier(tables.LAW, cost)
    assert frontier.parameters(flops) == pytest.approx(GRID[best], rel=1e-4)
    assert frontier.tokens(flops) == pytest.approx(flops / cost(GRID[best]), rel=1e-4)
    assert frontier.loss(flops) == pytest.approx(losses[best], rel=1e-9)
    assert frontier.flops(losses[best]) == pytest.approx(flops, rel=1e-6)
    more = np.log(frontier.parameters(flops * 1.01) / frontier.parameters(flops))
    assert frontier.a_opt == pytest.approx(more / np.log(1.01), rel=1e-6)


def test_multiplier_is_that_of_a_bisection_and_infinite_below_e():
    other = dataclasses.replace(tables.LAW, A=700.0, E=1.75, beta=0.35)
    base, kind = Frontier(tables.LAW, COSTS[0]), Frontier(other, COSTS[1])
    low, high, sizes = 1e19, 1e21, np.geomspace(1e8, 1e11, 40_001)
    for _ in range(50):
        middle = (low * high) ** 0.5
        losses = other.loss(sizes, middle / COSTS[1](sizes))
        low, high = (middle, high) if losses.min() > base.loss(1e20) else (low, middle)
    assert multiplier(base, kind, 1e20) == pytest.approx(low / 1e20, rel=1e-6)
    assert multiplier(base, base, 1e20) == pytest.approx(1)
    assert multiplier(kind, base, 1e32) == np.inf


def test_many_laws_at_once_and_those_without_an_optimum():
    many = dataclasses.replace(tables.LAW, alpha=np.array([0.3478, 0.5, -0.1]))
    found = Frontier(many, COSTS[0])
    assert found.loss(1e20)[0] == pytest.approx(float(Frontier(tables.LAW, COSTS[0]).loss(1e20)))
    assert np.isnan(found.a_opt[2]) and np.isnan(found.flops(3.0)[2]) and np.isfinite(found.flops(3.0)[:2]).all()


def test_cost_of_a_token_is_the_line_through_runs():
    sizes = np.array([1e6, 3e6, 1e7])
    assert TokenCost.of(sizes, 20 * sizes**0.94) == pytest.approx((20, 0.94))
    assert TokenCost.of(sizes, 6 * sizes) == pytest.approx((6, 1))
    assert TokenCost.of(np.full(3, 1e6), np.full(3, 7e6)) == pytest.approx((7, 1))
