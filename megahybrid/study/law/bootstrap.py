"""How far a fit may be off: laws fitted to runs drawn again, by the trunks that runs share."""

from __future__ import annotations

from collections.abc import Iterable
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
"""What part r of the noise's variance the runs of a trunk may share."""

SHARED_PRIOR = (1 - SHARED) ** -0.5 / ((1 - SHARED) ** -0.5).sum()
"""How likely each is before there are losses: 0.7 on average. Nobody has measured it, and branches share most of their
weights' history and data; were all as likely, intervals of few trunks that share 0.9 would hold 87 % instead of 95."""


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


def bootstrap(
    fit: Fit, trunks: ArrayLike, replicates: int, rng: np.random.Generator, shared: Array | None = None
) -> Replicates:
    """Fit the law again, from where it is, to `replicates` drawings of one kind's runs.

    Args:
        fit: of one kind.
        trunks: [runs], equal where runs share a trunk, and with it a part of their noise.
        replicates: how many.
        rng: draws.
        shared: [SHARED], how likely each part is, where other runs tell of it, too; what these tell when left out.
    """
    trunks = np.unique(trunks, return_inverse=True)[1]
    count = trunks.max() + 1
    observed, weights = np.log(fit.points.losses), np.ones(len(fit.points))
    if count >= ENOUGH_TRUNKS:
        weights = rng.multinomial(count, np.full(count, 1 / count), replicates)[:, trunks].astype(float)
        noise = rng.choice(fit.residuals, replicates)
    else:
        model = Noise(fit.jacobian, trunks)
        if shared is None:
            shared = posterior([model.likelihood(fit.residuals)])
        drawn, noise = model.draw(fit.residuals, shared, replicates, rng)
        observed = observed - fit.residuals + drawn
    start = np.repeat(fit.theta[None], replicates, axis=0)
    theta, _, _ = minimise(start, fit.points.terms, observed, weights, DELTA, tolerance=1e-8, steps=60)
    return Replicates(Law.of(theta, fit.points.centre), noise)


class Noise:
    """What a fit's residuals tell of the noise of one kind's runs.

    It is normal, with variance s² of which runs of a trunk share the part r. Likely is what the residuals make so, by
    the restricted likelihood (Patterson and Thompson 1971), with flat priors of log s and SHARED_PRIOR: few runs make
    intervals wider, as Student's t does.
    """

    def __init__(self, jacobian: Array, trunks: NDArray[np.int_]):
        """`jacobian`: of the runs' log losses by the law's parameters, [runs, P]; `trunks`: [runs], 0, 1, …."""
        runs, parameters = jacobian.shape
        self._trunks = trunks
        self._outside = np.linalg.qr(jacobian, mode="complete")[0][:, parameters:]
        same, part = (trunks[:, None] == trunks).astype(float), SHARED[:, None, None]
        inner = self._outside.T @ ((1 - part) * np.eye(runs) + part * same) @ self._outside
        self._inverse, self._volume = np.linalg.inv(inner), np.linalg.slogdet(inner)[1]

    def likelihood(self, residuals: Array) -> Array:
        """Its logarithm, up to a constant, at each of SHARED."""
        freedom = self._outside.shape[1]
        return -self._volume / 2 - freedom / 2 * np.log(self._squares(residuals) + 1e-300)

    def draw(self, residuals: Array, shared: Array, replicates: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """Noise of the runs [replicates, runs] and of a new run [replicates]; `shared` is of `posterior`."""
        chosen = rng.choice(len(SHARED), replicates, p=shared)
        scale = np.sqrt(self._squares(residuals)[chosen] / rng.chisquare(self._outside.shape[1], replicates))
        return scale[:, None] * unit_noise(self._trunks, SHARED[chosen], rng), scale * rng.standard_normal(replicates)

    def _squares(self, residuals: Array) -> Array:
        left = self._outside.T @ residuals
        return np.einsum("i,sij,j->s", left, self._inverse, left)


def posterior(likelihoods: Iterable[Array]) -> Array:
    """How likely each of SHARED is, [SHARED], by those of all kinds, which are taken to share as much."""
    total = np.log(SHARED_PRIOR) + sum(likelihoods)
    chances = np.exp(total - total.max())
    return chances / chances.sum()


def unit_noise(trunks: NDArray[np.int_], shared: Array, rng: np.random.Generator) -> Array:
    """Normal noise of variance 1, of which runs of a trunk share a part: [replicates, runs].

    Args:
        trunks: [runs], 0, 1, ….
        shared: [replicates].
        rng: draws.
    """
    own = rng.standard_normal((len(shared), len(trunks)))
    common = rng.standard_normal((len(shared), trunks.max() + 1))[:, trunks]
    return own * np.sqrt(1 - shared[:, None]) + common * np.sqrt(shared[:, None])
