"""Approach 2, rollouts, and whether data have the law's form."""

import dataclasses

import numpy as np
import pytest

from megahybrid.study.law.approach2 import bias, lowest
from megahybrid.study.law.fit import Points, fit
from megahybrid.study.law.form import chance, influence, misfits
from megahybrid.study.law.frontier import Frontier, TokenCost
from megahybrid.study.law.law import Law
from megahybrid.study.law.rollout import rollout
from tests.study import tables


def test_bias_of_approach_2_on_chinchillas_surface():
    """Hoffmann et al.'s own law, five budgets of 16 sizes 8 times below to 8 times above the best: at 1e24 FLOPs the
    best number of tokens comes 2.9 % low, without any noise."""
    frontier = Frontier(Law(A=406.4, B=410.7, E=1.69, alpha=0.34, beta=0.28), TokenCost())
    parameters, tokens = tables.isoflop(10.0 ** np.arange(17, 22), 16, law=frontier.law)
    found = bias(frontier, parameters, 6 * parameters * tokens, 1e24)
    assert found["tokens"] == pytest.approx(-0.029, abs=0.001)
    assert found["a_opt"] == pytest.approx(0, abs=1e-4)


def test_approach_2_is_right_where_losses_are_parabolas():
    flops = np.repeat([1e17, 1e18, 1e19], 5)
    best = 3.0 * flops**0.52
    sizes = best * np.tile(np.geomspace(0.2, 4, 5), 3)
    losses = 2 + 0.1 * np.log(sizes / best) ** 2
    found = lowest(sizes, flops * np.tile([1, 1.01, 0.99, 1, 1], 3), losses)
    assert found.slope == pytest.approx(0.52, abs=1e-9)
    assert found.best(1e24) == pytest.approx(3 * 1e24**0.52, rel=0.02)
    away = 2 + 0.1 * np.log(sizes / best / np.repeat([1, 50, 50], 5)) ** 2
    assert lowest(sizes, flops, away) is None  # one budget alone has its lowest point between its sizes
    parameters, tokens = tables.ladder()
    assert lowest(parameters, 6 * parameters * tokens, tables.LAW.loss(parameters, tokens)) is None


def test_rollout_predicts_the_next_budget_from_smaller_ones():
    parameters, tokens = tables.isoflop((1e17, 1e18, 1e19, 1e20))
    losses = tables.LAW.loss(parameters, tokens)
    losses[-2:] *= 0.99, 1.01
    flops = 6 * parameters * tokens
    steps = list(rollout(Points(parameters, tokens, losses), flops, np.arange(28), 200, np.random.default_rng(0)))
    assert [step.fitted for step in steps] == [7, 14, 21]
    assert steps[1].errors == pytest.approx(np.zeros(7), abs=1e-6)
    assert steps[2].errors == pytest.approx([0] * 5 + [-0.01, 0.01], abs=1e-6)
    assert not steps[2].covered[-2:].any()


def test_rollout_covers_where_there_is_noise():
    parameters, tokens = tables.isoflop((1e17, 1e18, 1e19))
    runs = tables.points(tables.LAW, parameters, tokens, noise=0.002)
    step = list(rollout(runs, 6 * parameters * tokens, np.arange(21), 200, np.random.default_rng(0)))[-1]
    assert step.covered.sum() >= 6 and 1e-4 < np.abs(step.errors).max() < 0.02


def test_chance_is_that_of_the_f_distribution():
    assert chance(3 * 4.10, 3, 8.0, 8) == pytest.approx(0.05, abs=0.005)  # tables: F(3, 8) is above 4.07 in 5 %
    assert np.isnan(chance(1.0, 3, 0.0, 0))


def studies(count, noise=0.003, seeds=1, changed=None, shared=0.0):
    """Fits of as many studies of two kinds; the second kind's losses are changed."""
    rng = np.random.default_rng(2)
    parameters, tokens = (np.concatenate([each] + [each[:3]] * (seeds - 1)) for each in tables.ladder())
    trunks = np.arange(len(parameters)) // 3
    for _ in range(count):
        losses = [tables.noisy(tables.LAW, parameters, tokens, noise, rng, trunks, shared) for _ in range(2)]
        if changed is not None:
            losses[1] = losses[1] * changed(parameters, tokens)
        yield [fit(Points(parameters, tokens, each)) for each in losses]


def repeated_data(parameters, tokens):
    """Tokens beyond 100M are worth as much as none."""
    return tables.LAW.loss(parameters, np.minimum(tokens, 1e8)) / tables.LAW.loss(parameters, tokens)


def diverging(parameters, tokens):
    """The second size trains badly, the more so the longer."""
    return np.where(parameters == tables.SIZES[1], 1 + 0.03 * np.log(tokens / parameters / 5), 1)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("changed", [repeated_data, diverging])
def test_losses_without_the_laws_form_are_found(seeds, changed):
    for fits in studies(4, seeds=seeds, changed=changed):
        found = list(misfits(fits))
        assert found and {each.kind for each in found} == {1}
        assert all(0.002 < each.size < 0.2 for each in found)
        if changed is repeated_data:
            assert all("tokens" in each.along for each in found if each.test == "bend")


@pytest.mark.parametrize("along", ["parameters", "parameters and tokens", "tokens"])
def test_a_bend_is_told_by_what_it_goes_with(along):
    """A table without repeats or other kinds, whose noise is not known."""
    rng = np.random.default_rng(4)
    runs = tables.points(tables.LAW, *tables.isoflop((1e16, 1e17, 1e18, 1e19), 10, spread=20), noise=0.001, rng=rng)
    assert list(misfits([fit(runs)], noise=1.0)) == []
    n, d = np.log(runs.parameters), np.log(runs.tokens)
    n, d = n - n.mean(), d - d.mean()
    shape = {"parameters": n * n, "parameters and tokens": n * d, "tokens": d * d}[along]
    (found,) = misfits([fit(dataclasses.replace(runs, losses=runs.losses * np.exp(0.002 * shape)))], noise=1.0)
    assert (found.test, found.along) == ("bend", along) and found.chance < 1e-3


def test_seeds_tell_a_misfit_that_is_no_bend():
    """One cell of the middle, with three seeds each, is off."""

    def off(parameters, tokens):
        return np.where((parameters == tables.SIZES[2]) & (tokens == 30 * parameters), 1.03, 1)

    found = [each.test for fits in studies(5, noise=0.001, seeds=3, changed=off) for each in misfits(fits)]
    assert found.count("repeats") >= 4


@pytest.mark.slow
@pytest.mark.parametrize("seeds, shared", [(1, 0.0), (3, 0.0), (1, 0.8)])
def test_false_alarms_are_rare(seeds, shared):
    """At most 5 % of 200 studies whose losses have the law's form."""
    made = studies(200, seeds=seeds, shared=shared)
    alarms = np.array([[bool(list(misfits(fits))), any(map(influence, fits))] for fits in made])
    print(alarms.mean(axis=0))
    assert (alarms.mean(axis=0) <= 0.05).all()


def test_influence_of_the_largest_losses():
    rng = np.random.default_rng(0)
    parameters = 10 ** rng.uniform(7.5, 10, 200)
    tokens = parameters * 10 ** rng.uniform(0.3, 2.3, 200)
    runs = tables.points(tables.LAW, parameters, tokens, noise=0.004, rng=rng)
    assert influence(fit(runs)) is None
    losses = runs.losses.copy()
    losses[np.argsort(losses)[-4:]] *= 1.4
    changed = dataclasses.replace(runs, losses=losses)
    found = influence(fit(changed))
    kept = np.sort(np.argsort(losses)[:-4])
    assert found.runs == 4
    assert found.without == pytest.approx(getattr(fit(changed[kept]).law, found.name))
    assert found.within == pytest.approx(getattr(fit(changed).law, found.name))
