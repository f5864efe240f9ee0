"""How far a fit may be off: laws fitted to runs drawn again, by the trunks that runs share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megahybrid.study.law.fit import DELTA, Fit
from megahybrid.study.law.law import Array, Law
from megahybrid.study.law.solver import minimise

REPLICATES = 1000

ENOUGH_TRUNKS = 40
"""From here on trunks are drawn with replacement; of fewer, that would often leave too few different sizes for a law
(below about 40 clusters such intervals are known to fail: Cameron, Gelbach and Miller 2008), and noise is drawn."""

SHARED = np.append(np.linspace(0, 0.95, 20), [0.98, 0.99])
"""What part of the noise's variance the runs of a trunk may share."""


@dataclass(frozen=True)
class Replicates:
    """Laws that might have been fitted just as well.

    Attributes:
        law: as many as replicates.
        noise: [replicates], how far the log loss of a new run would lie from each.
    """

    law: Law
    noise: Array

    def loss_of_a_run(self, parameters: ArrayLike, tokens: ArrayLike) -> Array:
        """[replicates], nats a token, of one new run, with its noise."""
        return self.law.loss(parameters, tokens) * np.exp(self.noise)


def interval(values: Array) -> list[float]:
    """The central 95 % of those that are numbers; an end may be infinite."""
    values = values[~np.isnan(values)]
    if not len(values):
        return [float("nan")] * 2
    low, high = np.percentile(values, [2.5, 97.5], method="nearest")
    return [float(low), float(high)]


def bootstrap(fit: Fit, trunks: ArrayLike, replicates: int, rng: np.random.Generator) -> Replicates:
    """Fit the law again, from where it is, to `replicates` drawings of one kind's runs.

    Args:
        fit: of one kind.
        trunks: [runs], equal where runs share a trunk, and with it a part of their noise.
        replicates: how many.
        rng: draws.
    """
    trunks = np.unique(trunks, return_inverse=True)[1]
    count = trunks.max() + 1
    observed, weights = np.log(fit.points.losses), np.ones(len(fit.points))
    if count >= ENOUGH_TRUNKS:
        weights = rng.multinomial(count, np.full(count, 1 / count), replicates)[:, trunks].astype(float)
        noise = rng.choice(fit.residuals, replicates)
    else:
        drawn, noise = _noise(fit, trunks, replicates, rng)
        observed = observed - fit.residuals + drawn
    start = np.repeat(fit.theta[None], replicates, axis=0)
    theta, _, _ = minimise(start, fit.points.terms, observed, weights, DELTA, tolerance=1e-8, steps=60)
    return Replicates(Law.of(theta, fit.points.centre), noise)


def _noise(fit: Fit, trunks: NDArray[np.int_], replicates: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Noise of the runs [replicates, runs] and of a new run [replicates], normal, as likely as the residuals make it.

    Its variance s² ((1 - r) + r where a trunk is shared) is drawn from its posterior with flat priors of log s and r,
    by the likelihood of what the fit leaves of the losses, the restricted one (Patterson and Thompson 1971): so few
    runs make intervals wider, as Student's t does.
    """
    runs, parameters = fit.jacobian.shape
    outside = np.linalg.qr(fit.jacobian, mode="complete")[0][:, parameters:]
    left = outside.T @ fit.residuals
    same = (trunks[:, None] == trunks).astype(float)
    shared = SHARED if same.sum() > runs else SHARED[:1]
    covariances = (1 - shared[:, None, None]) * np.eye(runs) + shared[:, None, None] * same
    inner = outside.T @ covariances @ outside
    squares = np.einsum("i,sij,j->s", left, np.linalg.inv(inner), left)
    likelihood = -np.linalg.slogdet(inner)[1] / 2 - len(left) / 2 * np.log(squares + 1e-300)
    chances = np.exp(likelihood - likelihood.max())
    chosen = rng.choice(len(shared), replicates, p=chances / chances.sum())
    scale = np.sqrt(squares[chosen] / rng.chisquare(len(left), replicates))
    own = rng.standard_normal((replicates, runs)) * np.sqrt(1 - shared[chosen, None])
    common = rng.standard_normal((replicates, trunks.max() + 1))[:, trunks] * np.sqrt(shared[chosen, None])
    return scale[:, None] * (own + common), scale * rng.standard_normal(replicates)
