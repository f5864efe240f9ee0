"""What a study is expected to know, against figures worked out apart from this code."""

from types import SimpleNamespace

import numpy as np
import pytest

from megahybrid.errors import UserError
from megahybrid.study.expected import PRIOR, Runs, expect, huber_efficiency, precisions
from megahybrid.study.law.bootstrap import SHARED, SHARED_PRIOR, bootstrap, interval
from megahybrid.study.law.fit import DELTA, Points, fit
from megahybrid.study.law.law import Law
from tests.study import tables

SIZES = np.geomspace(60e6, 600e6, 5)
TARGET = (7e9, 200 * 7e9)
NOISE = 0.003
ONE = Law(A=0, B=0, E=1, alpha=1, beta=1)


def ratios(*tokens_per_parameter: float):
    return tables.ladder(SIZES, np.array(tokens_per_parameter))


def iso_flops(*budgets: float):
    """Five sizes about the best of each budget, from a quarter of it to four times as large."""
    return tables.isoflop(budgets, 5, 4.0, PRIOR)


def log_losses(theta, parameters, tokens):
    a, b, e, alpha, beta = theta
    return np.log(np.exp(a - alpha * np.log(parameters)) + np.exp(b - beta * np.log(tokens)) + np.exp(e))


def moves(parameters, tokens):
    """By how much a_opt and the law's loss at TARGET move with the log loss of each run: by finite differences, in
    plain A, B, E and exponents."""
    theta = np.array([np.log(PRIOR.A), np.log(PRIOR.B), np.log(PRIOR.E), PRIOR.alpha, PRIOR.beta])
    steps = 1e-6 * np.eye(5)

    def slopes(function):
        return np.stack([(function(theta + step) - function(theta - step)) / 2e-6 for step in steps], axis=-1)

    inverse = np.linalg.pinv(slopes(lambda each: log_losses(each, parameters, tokens)), rcond=1e-12)
    return [slopes(figure) @ inverse for figure in (lambda x: x[4] / (x[3] + x[4]), lambda x: log_losses(x, *TARGET))]


@pytest.mark.parametrize(
    ("runs", "a_opt", "loss", "student"),
    # Of Student's t, 15 and 10 degrees of freedom, by 1.96, times the mean of s by sigma.
    [
        (ratios(10, 20, 40, 80), 0.06, 0.021, 2.131 * 0.983 / 1.96),
        (iso_flops(3e18, 1e19, 3e19), 0.03, 0.026, 2.228 * 0.975 / 1.96),
    ],
    ids=["four ratios", "three isoFLOP budgets"],
)
def test_independent_runs_know_as_much_as_normal_theory_and_students_t_say(runs, a_opt, loss, student):
    known = 1.96 * NOISE * np.linalg.norm(moves(*runs), axis=1)
    assert known[0] == pytest.approx(a_opt, abs=0.005) and known[1] == pytest.approx(loss, abs=0.001)
    for noise in (NOISE, NOISE / 100):  # far above Huber's delta least squares know more, below it as much
        law = known * noise / NOISE / huber_efficiency_by_quadrature(noise) ** 0.5
        expected = law[0], np.hypot(law[1], 1.96 * noise)  # the law's part alone is wider
        (found,) = precisions([Runs(*runs, np.arange(len(runs[0])))], [[TARGET]], noise)
        assert (found.a_opt, found.losses[0]) == pytest.approx(student * np.array(expected), rel=0.05)


def huber_efficiency_by_quadrature(noise):
    x, step = np.linspace(-9, 9, 900_001, retstep=True)
    density, slope = np.exp(-x * x / 2) / np.sqrt(2 * np.pi), noise * np.abs(x) <= DELTA
    score = np.clip(noise * x, -DELTA, DELTA) / noise
    return ((slope * density).sum() * step) ** 2 / ((score**2 * density).sum() * step)


@pytest.mark.parametrize(("noise", "efficiency"), [(1e-4, 1), (1e-3, 0.903), (6.5e-3, 0.688), (0.5, 2 / np.pi)])
def test_hubers_efficiency(noise, efficiency):
    """The second is in tables of robust statistics: 0.903 at c = 1."""
    assert huber_efficiency(noise) == pytest.approx(efficiency, abs=1e-3)
    assert huber_efficiency(noise) == pytest.approx(huber_efficiency_by_quadrature(noise), rel=1e-3)


def test_many_noisy_runs_know_as_much_as_their_fits_say():
    """90 runs of 0.65 % noise, whose intervals least squares would make 17 % narrower."""
    sizes, target, rng, widths = np.geomspace(6e5, 6e6, 6), (3.5e7, 1.36e8), np.random.default_rng(0), []
    parameters, tokens = np.repeat(sizes, 15), np.tile([8e7, 1.05e8, 1.35e8], 30)
    for _ in range(20):
        losses = tables.noisy(PRIOR, parameters, tokens, 6.5e-3, rng)
        laws = bootstrap(fit(Points(parameters, tokens, losses)), np.arange(90), 200, rng)
        widths.append(np.ptp(interval(laws.loss_of_a_run(*target))) / 2 / PRIOR.loss(*target))
    (found,) = precisions([Runs(parameters, tokens, np.arange(90))], [[target]], 6.5e-3)
    assert found.losses[0] == pytest.approx(np.mean(widths), rel=0.1)


@pytest.mark.parametrize(("shared", "least", "most"), [(0.0, 0.97, 1), (0.5, 0.95, 1), (0.9, 0.93, 0.995)])
@pytest.mark.parametrize("kinds", [1, 3])
def test_of_branches_as_many_errors_are_as_small_as_expected(shared, least, most, kinds):
    """Whatever part of the noise they share, which nobody knows before."""
    runs, trunks, noise = ratios(10, 20, 40, 80), np.repeat(np.arange(5), 4), DELTA / 100  # least squares
    rng = np.random.default_rng(0)
    losses = np.array([tables.noisy(ONE, *runs, noise, rng, trunks, shared) for _ in range(4000)])
    found = precisions([Runs(*runs, trunks)] * kinds, [[TARGET]] * kinds, noise)[0]
    errors = np.log(losses) @ np.transpose(moves(*runs))
    errors[:, 1] -= noise * rng.standard_normal(4000)
    for figure, half in zip(errors.T, (found.a_opt, found.losses[0]), strict=True):
        assert least <= (np.abs(figure) <= half).mean() <= most


def test_branches_know_as_much_as_fits_to_made_up_studies():
    """Whose noise trunks share by parts that are as likely as SHARED_PRIOR says."""
    parameters, tokens, trunks = *tables.ladder(), np.repeat(np.arange(4), 3)
    target, rng, widths = (3e7, 6e8), np.random.default_rng(0), []
    for shared in rng.choice(SHARED, 80, p=SHARED_PRIOR):
        losses = tables.noisy(PRIOR, parameters, tokens, 1e-4, rng, trunks, shared)
        laws = bootstrap(fit(Points(parameters, tokens, losses)), trunks, 100, rng)
        widths.append(np.ptp(interval(laws.loss_of_a_run(*target))) / 2 / PRIOR.loss(*target))
    (found,) = precisions([Runs(parameters, tokens, trunks)], [[target]], 1e-4)
    assert found.losses[0] == pytest.approx(np.mean(widths), rel=0.15)
    (alone,) = precisions([Runs(parameters, tokens, np.arange(12))], [[target]], 1e-4)
    assert found.losses[0] > 1.5 * alone.losses[0]
    third = precisions([Runs(parameters, tokens, trunks)] * 3, [[target]] * 3, 1e-4)[2]
    assert found.losses[0] > 1.2 * third.losses[0], "three kinds tell more of what trunks share"


@pytest.mark.parametrize(("tokens_per_parameter", "refused"), [([20], True), ([20, 28], True), ([10, 20, 40], False)])
def test_ratios_count_as_they_are_asked_for(tokens_per_parameter, refused):
    """Whole steps alone make them differ by a percent."""
    parameters, asked = ratios(*tokens_per_parameter, *tokens_per_parameter)
    realised = asked * (1 + 0.01 * np.random.default_rng(0).uniform(-1, 1, len(asked)))
    alike = {"kind": "a", "role": "single", "held_out": False}
    cells = [
        SimpleNamespace(
            name=str(number), trunk=str(number), parameters=size, tokens=tokens, asked=wanted * size, **alike
        )
        for number, (size, tokens, wanted) in enumerate(zip(parameters, realised, asked, strict=True))
    ]
    for cell in cells:
        cell.flops_per_token = cell.parameters
    target = SimpleNamespace(parameters=7e9, tokens=1.4e12)
    study = SimpleNamespace(kinds=["a"], targets=[target], noise=NOISE, give_up=[])
    if refused:
        with pytest.raises(UserError, match=r"a: all its runs have about 2[04] tokens a parameter, one"):
            expect(study, cells)
    else:
        assert 0.01 < expect(study, cells)["a"].losses[0] < 0.05
