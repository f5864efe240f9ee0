"""What a study is expected to know, against figures worked out apart from this code."""

import numpy as np
import pytest

from megahybrid.study.expected import PRIOR, precision
from megahybrid.study.law.law import CONDITION_LIMIT

SIZES = np.geomspace(60e6, 600e6, 5)
TARGET = (7e9, 200 * 7e9)


def ratios(*tokens_per_parameter: float):
    parameters = np.repeat(SIZES, len(tokens_per_parameter))
    return parameters, parameters * np.tile(tokens_per_parameter, len(SIZES))


def iso_flops(*budgets: float):
    """Five sizes about the best of each budget, from a quarter of it to four times as large."""
    power = PRIOR.beta / (PRIOR.alpha + PRIOR.beta)
    best = (PRIOR.alpha * PRIOR.A / PRIOR.beta / PRIOR.B) ** (1 / (PRIOR.alpha + PRIOR.beta))
    parameters = [best * (flops / 6) ** power * np.geomspace(1 / 4, 4, 5) for flops in budgets]
    return np.concatenate(parameters), np.concatenate(
        [flops / 6 / each for flops, each in zip(budgets, parameters, strict=True)]
    )


@pytest.mark.parametrize(
    ("runs", "a_opt", "loss"),
    [(ratios(10, 20, 40, 80), 0.06, 0.021), (iso_flops(3e18, 1e19, 3e19), 0.03, 0.026)],
    ids=["four ratios", "three isoFLOP budgets"],
)
def test_designs_are_as_good_as_they_are_known_to_be(runs, a_opt, loss):
    found = precision(*runs, [TARGET], 0.003)
    assert found.a_opt == pytest.approx(a_opt, abs=0.005)
    assert found.losses[0] == pytest.approx(loss, abs=0.001)


@pytest.mark.parametrize("seeds", [1, 3])
def test_one_ratio_tells_nothing_however_often_it_is_repeated(seeds):
    found = precision(*ratios(*[20] * seeds), [TARGET], 0.003)
    assert found.condition > 1e16 > CONDITION_LIMIT
    assert found.a_opt == np.inf


def test_the_interval_is_that_of_fits_to_noisy_losses():
    """Least squares by many small Gauss-Newton steps, in plain A, B, E and exponents."""
    rng = np.random.default_rng(0)
    parameters, tokens = ratios(10, 20, 40, 80)
    truth = np.array([np.log(PRIOR.A), np.log(PRIOR.B), np.log(PRIOR.E), PRIOR.alpha, PRIOR.beta])

    def losses(theta, n, d):
        a, b, e, alpha, beta = theta[..., None] if theta.ndim == 1 else theta.T[..., None]
        return np.log(np.exp(a) * n**-alpha + np.exp(b) * d**-beta + np.exp(e))

    observed = losses(truth, parameters, tokens) + 1e-5 * rng.standard_normal((2000, len(tokens)))
    step = 1e-6
    slopes = np.stack(
        [
            (losses(truth + step * unit, parameters, tokens) - losses(truth - step * unit, parameters, tokens))
            / (2 * step)
            for unit in np.eye(5)
        ],
        axis=-1,
    )
    slopes = slopes.reshape(len(tokens), 5)
    fitted = truth + (observed - losses(truth, parameters, tokens)) @ np.linalg.pinv(slopes).T
    spread = losses(fitted, *TARGET).std() * 1.96
    assert precision(parameters, tokens, [TARGET], 1e-5).losses[0] == pytest.approx(spread, rel=0.06)
