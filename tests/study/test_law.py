"""The law and its fits, against other ways to compute them."""

import dataclasses
import math

import numpy as np
import pytest

from megahybrid.errors import UserError
from megahybrid.study.law.fit import Points, fit
from megahybrid.study.law.law import Centre, Law, condition, jacobian
from megahybrid.study.law.solver import _derivatives, minimise, objective
from tests.study import tables

NUMBERS = ("A", "B", "E", "alpha", "beta")


@pytest.mark.parametrize("places", [tables.ladder(), tables.isoflop(), tables.ladder(tables.SIZES * 1000)])
def test_a_law_without_noise_is_found_again(places):
    """The second acceptance test of scaling studies: to 1e-6."""
    found = fit(tables.points(tables.LAW, *places)).law
    for name in NUMBERS:
        assert getattr(found, name) == pytest.approx(getattr(tables.LAW, name), rel=1e-6)


def test_kinds_that_share_exponents_are_found_again():
    other = dataclasses.replace(tables.LAW, A=600.0, B=1500.0, E=1.7)
    parameters, tokens = tables.ladder()
    losses = np.concatenate([tables.LAW.loss(parameters, tokens), other.loss(1.1 * parameters, tokens)])
    sizes = np.concatenate([parameters, 1.1 * parameters])
    found = fit(Points(sizes, np.tile(tokens, 2), losses, np.repeat([0, 1], len(tokens)))).laws
    for law, truth in zip(found, (tables.LAW, other), strict=True):
        for name in NUMBERS:
            assert getattr(law, name) == pytest.approx(getattr(truth, name), rel=1e-6)


@pytest.mark.parametrize("delta", [1e-3, 1e-2, math.inf])
def test_objective_is_the_sum_of_huber_losses_and_nothing_near_is_lower(delta):
    runs = tables.points(tables.LAW, *tables.ladder(), noise=0.004)
    found = fit(runs, delta)

    def naive(theta):
        total, law = 0.0, Law.of(theta, runs.centre)
        for size, count, loss in zip(runs.parameters, runs.tokens, runs.losses, strict=True):
            error = abs(math.log(law.A / size**law.alpha + law.B / count**law.beta + law.E) - math.log(loss))
            total += error**2 / 2 if error <= delta else delta * (error - delta / 2)
        return total

    assert found.objective == pytest.approx(naive(found.theta), rel=1e-9)
    assert found.gradient_norm < 1e-12
    rng = np.random.default_rng(0)
    for size in (1e-4, 1e-2, 0.1):
        for _ in range(30):
            assert naive(found.theta + size * rng.standard_normal(5)) > found.objective


def test_minimise_weighs_runs_and_takes_each_fit_on_its_own():
    runs = tables.points(tables.LAW, *tables.ladder(), noise=0.004)
    weights = np.random.default_rng(1).integers(1, 4, len(runs))
    again = np.repeat(np.arange(len(runs)), weights)
    repeated = fit(runs[again], 1e-2)
    start = np.stack([tables.LAW.theta(runs.centre)] * 2)
    both = np.stack([weights, np.ones(len(runs))]).astype(float)
    theta, value, _ = minimise(start, runs.terms, np.log(runs.losses), both, 1e-2, 1e-20, 100)
    assert Law.of(theta[0], runs.centre).beta == pytest.approx(repeated.law.beta, rel=1e-7)
    assert value[0] == pytest.approx(repeated.objective, rel=1e-9)
    assert Law.of(theta[1], runs.centre).beta == pytest.approx(fit(runs, 1e-2).law.beta, rel=1e-7)
    assert objective(start, runs.terms, np.log(runs.losses), both, 1e-2) == pytest.approx(value, rel=1)


def test_newtons_steps_have_the_derivatives_of_differences():
    runs = tables.points(tables.LAW, *tables.ladder(), noise=0.004)
    observed, weights = np.log(runs.losses)[None], np.random.default_rng(1).integers(1, 4, (1, len(runs))).astype(float)
    theta, step = tables.LAW.theta(runs.centre)[None] + 1e-3, 1e-7
    gradient, hessian, _ = _derivatives(theta, runs.terms, observed, weights, 5e-3)
    for column in range(5):
        ends = [theta + sign * step * np.eye(5)[column] for sign in (1, -1)]
        values = [objective(end, runs.terms, observed, weights, 5e-3)[0] for end in ends]
        assert gradient[0, column] == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)
        slopes = [_derivatives(end, runs.terms, observed, weights, 5e-3)[0][0] for end in ends]
        assert hessian[0, column] == pytest.approx((slopes[0] - slopes[1]) / (2 * step), rel=1e-5)


def test_one_outlier_hardly_moves_the_fit():
    runs = tables.points(tables.LAW, *tables.ladder())
    losses = runs.losses.copy()
    losses[5] *= 1.2
    found = fit(dataclasses.replace(runs, losses=losses)).law
    assert found.beta == pytest.approx(tables.LAW.beta, rel=1e-3)
    assert fit(dataclasses.replace(runs, losses=losses), math.inf).law.beta != pytest.approx(tables.LAW.beta, rel=3e-2)


def test_jacobian_is_that_of_differences():
    parameters, tokens = tables.ladder()
    centre = Centre.of(parameters, tokens)
    theta, step = tables.LAW.theta(centre), 1e-6
    assert abs(Law.of(theta, centre).A / tables.LAW.A - 1) < 1e-12
    for column, found in enumerate(jacobian(tables.LAW, parameters, tokens, centre).T):
        ends = [Law.of(theta + sign * step * np.eye(5)[column], centre).loss(parameters, tokens) for sign in (1, -1)]
        assert found == pytest.approx((np.log(ends[0]) - np.log(ends[1])) / (2 * step), abs=1e-8)


def test_condition_tells_designs_that_identify_the_law():
    """At one ratio of tokens to parameters it is singular; four ratios make it regular."""
    sizes = np.array([60e6, 107e6, 190e6, 337e6, 600e6])

    def of(ratios):
        places = tables.ladder(sizes, np.array(ratios))
        return condition(jacobian(tables.LAW, *places, Centre.of(*places)))

    assert of([20.0]) > 1e16
    assert of([10.0, 20.0, 40.0, 80.0]) < 1e5
    places = tables.ladder(sizes[:4], np.array([20.0]))
    assert condition(jacobian(tables.LAW, *places, Centre.of(*places))) == np.inf


def test_losses_that_rise_with_size_and_tokens_are_refused():
    parameters, tokens = tables.ladder()
    with pytest.raises(UserError, match="no law that falls"):
        fit(Points(parameters, tokens, 1 + (parameters / 1e6) ** 0.1 + (tokens / 1e8) ** 0.1))
