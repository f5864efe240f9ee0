"""The parametric law L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv 2203.15556, approach 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

CONDITION_LIMIT = 1e10
"""Beyond it the runs do not tell the law's terms apart,"""

BARELY = 1e7
"""and from this on they barely do, which is warned of."""


class Centre(NamedTuple):
    """Where logarithms are counted from, so that the law's terms are of like size and a fit is well conditioned."""

    log_parameters: float
    log_tokens: float

    @classmethod
    def of(cls, parameters: ArrayLike, tokens: ArrayLike) -> Centre:
        """The geometric mean of runs."""
        return cls(float(np.log(parameters).mean()), float(np.log(tokens).mean()))


@dataclass(frozen=True)
class Law:
    """One law, or as many as the five numbers have elements: those of a bootstrap's replicates, say.

    Attributes:
        A, alpha: of the term A / N^alpha, N in parameters.
        B, beta: of the term B / D^beta, D in tokens.
        E: the loss that no size and no data get below, nats a token.
    """

    A: Array | float
    B: Array | float
    E: Array | float
    alpha: Array | float
    beta: Array | float

    @classmethod
    def of(cls, theta: Array, centre: Centre) -> Law:
        """From (a, b, log E, alpha, beta), the last axis of `theta`, where a and b are the logarithms of the terms at
        the centre."""
        a, b, e, alpha, beta = np.moveaxis(theta, -1, 0)
        with np.errstate(over="ignore"):
            A, B = np.exp(a + alpha * centre.log_parameters), np.exp(b + beta * centre.log_tokens)
        return cls(A, B, np.exp(e), alpha, beta)

    def theta(self, centre: Centre) -> Array:
        """The inverse of `of`: [5], or [laws, 5]."""
        a = np.log(self.A) - self.alpha * centre.log_parameters
        b = np.log(self.B) - self.beta * centre.log_tokens
        return np.stack([a, b, np.log(self.E), self.alpha, self.beta], axis=-1)

    def loss(self, parameters: ArrayLike, tokens: ArrayLike) -> Array:
        """Nats a token, of arrays that broadcast with the law's."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self.A * np.power(parameters, -self.alpha) + self.B * np.power(tokens, -self.beta) + self.E


def terms(log_parameters: Array, log_tokens: Array, kind: NDArray[np.int_]) -> Array:
    """The logarithms of the law's three terms as linear functions of theta: [3, runs, 3 kinds + 2].

    Theta is (a of each kind, b of each, log E of each, alpha, beta): kinds share the exponents.

    Args:
        log_parameters, log_tokens: [runs], from the centre.
        kind: [runs], 0, 1, ….
    """
    kinds = int(kind.max(initial=0)) + 1
    found = np.zeros((3, len(kind), 3 * kinds + 2))
    for term in range(3):
        found[term, np.arange(len(kind)), term * kinds + kind] = 1
    found[0, :, -2] = -log_parameters
    found[1, :, -1] = -log_tokens
    return found


def log_loss(theta: Array, terms: Array) -> tuple[Array, Array]:
    """The law's log loss [fits, runs], and each term's share of the loss [3, fits, runs], for theta [fits, P]."""
    logarithms = theta @ terms.transpose(0, 2, 1)
    largest = logarithms.max(axis=0)
    parts = np.exp(logarithms - largest)
    total = parts.sum(axis=0)
    return largest + np.log(total), parts / total


def slopes(shares: Array, terms: Array) -> Array:
    """Derivatives of log loss by theta: [fits, runs, P]."""
    return sum(share[..., None] * term for share, term in zip(shares, terms, strict=True))


def jacobian(law: Law, parameters: ArrayLike, tokens: ArrayLike, centre: Centre) -> Array:
    """Derivatives of log loss by (a, b, log E, alpha, beta), which `Law.theta` has: [runs, 5].

    With runs whose log losses have the standard deviation s, the fit's covariance is s² (JᵀJ)⁻¹, and of the log loss
    at a target with derivatives j, at the same centre, the variance is jᵀ s² (JᵀJ)⁻¹ j.
    """
    parameters, tokens = np.atleast_1d(parameters), np.atleast_1d(tokens)
    places = np.log(parameters) - centre.log_parameters, np.log(tokens) - centre.log_tokens
    each = terms(*places, np.zeros(len(parameters), int))
    return slopes(log_loss(law.theta(centre)[None], each)[1], each)[0]


def condition(jacobian: Array) -> float:
    """The condition number of JᵀJ; infinite where there are fewer runs than parameters."""
    if jacobian.shape[0] < jacobian.shape[1]:
        return np.inf
    sizes = np.linalg.svd(jacobian, compute_uv=False)
    return float((sizes[0] / sizes[-1]) ** 2) if sizes[-1] > 0 else np.inf
