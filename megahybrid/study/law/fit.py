"""A fit of the law to runs of one kind, or of several that share its exponents."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megahybrid.errors import UserError
from megahybrid.study.law.law import Array, Centre, Law, condition, log_loss, slopes, terms
from megahybrid.study.law.solver import ROUNDING, minimise, objective

DELTA = 1e-3
"""Of Huber's loss, on log losses."""

EXPONENTS = np.linspace(0.02, 1.2, 48)
"""Of the grid of starts, for either exponent."""

POLISH = 1e-24
"""What part of the objective a step may still promise at the end: the gradient is then about 1e-13."""

LEAST_RUNS = 7
"""Of a kind: two more than the law has parameters."""

LEAST_RATIO = 1.5
"""Between the most and the fewest tokens a parameter of a kind's runs."""


class NoLaw(UserError):
    """No law can be fitted to the runs that there are."""


@dataclass(frozen=True)
class Points:
    """Runs that a law is fitted to.

    Attributes:
        parameters, tokens, losses: [runs].
        kind: [runs], 0, 1, …; kinds have their own A, B and E.
    """

    parameters: Array
    tokens: Array
    losses: Array
    kind: NDArray[np.int_] = field(default=None)

    def __post_init__(self):
        if self.kind is None:
            object.__setattr__(self, "kind", np.zeros(len(self.losses), int))

    def __len__(self) -> int:
        return len(self.losses)

    def __getitem__(self, chosen: ArrayLike) -> Points:
        return Points(self.parameters[chosen], self.tokens[chosen], self.losses[chosen], self.kind[chosen])

    @cached_property
    def centre(self) -> Centre:
        """Of their logarithms."""
        return Centre.of(self.parameters, self.tokens)

    @cached_property
    def terms(self) -> Array:
        """[3, runs, P], of `law.terms`."""
        log_parameters = np.log(self.parameters) - self.centre.log_parameters
        return terms(log_parameters, np.log(self.tokens) - self.centre.log_tokens, self.kind)


@dataclass(frozen=True)
class Fit:
    """A law that was fitted.

    Attributes:
        points: the runs.
        theta: [P], as in `law.terms`.
        objective: the sum of Huber losses.
        gradient_norm: the largest element of the objective's gradient.
    """

    points: Points
    theta: Array
    objective: float
    gradient_norm: float

    @property
    def law(self) -> Law:
        """The law of a fit of one kind."""
        return Law.of(self.theta, self.points.centre)

    @property
    def laws(self) -> list[Law]:
        """Of each kind."""
        own = self.theta[:-2].reshape(3, -1).T
        return [Law.of(np.concatenate([each, self.theta[-2:]]), self.points.centre) for each in own]

    @cached_property
    def jacobian(self) -> Array:
        """Derivatives of the runs' log losses by theta: [runs, P]."""
        return slopes(log_loss(self.theta[None], self.points.terms)[1], self.points.terms)[0]

    @cached_property
    def residuals(self) -> Array:
        """Log losses less the law's: [runs]."""
        return np.log(self.points.losses) - log_loss(self.theta[None], self.points.terms)[0][0]

    @property
    def condition(self) -> float:
        """Of the Gauss-Newton matrix JᵀJ."""
        return condition(self.jacobian)


def fit(points: Points, delta: float = DELTA) -> Fit:
    """Minimise the sum of Huber losses of log losses from the four best of a grid of starts.

    Raises NoLaw where nothing of the law's form comes near the losses.
    """
    starts = _starts(points)
    observed = np.log(points.losses)
    ones = np.ones(len(points))
    if not len(starts):
        raise NoLaw(
            "no law that falls with parameters and with tokens to a positive loss comes near the losses; check them, "
            "or give more runs."
        )
    best = np.argsort(objective(starts, points.terms, observed, ones, delta))[:4]
    theta, value, steepest = minimise(starts[best], points.terms, observed, ones, delta, POLISH, steps=300)
    chosen = np.where(value <= value.min() * (1 + 10 * ROUNDING), steepest, np.inf).argmin()
    return Fit(points, theta[chosen], float(value[chosen]), float(steepest[chosen]))


def _starts(points: Points) -> Array:
    """Variable projection: for each pair of exponents of the grid the A, B and E that make the relative error least,
    in closed form, where they are positive for every kind: [starts, P]."""
    found = [_closed_form(points[points.kind == kind], points.centre) for kind in range(points.kind.max() + 1)]
    own = np.stack(found, axis=-1)
    alpha, beta = np.nonzero((own > 0).all(axis=(-1, -2)))
    own = np.log(own[alpha, beta]).reshape(len(alpha), 3 * len(found))
    return np.column_stack([own, EXPONENTS[alpha], EXPONENTS[beta]])


def _closed_form(points: Points, centre: Centre) -> Array:
    """A, B and E, counted from the centre, of one kind: [alphas, betas, 3]."""
    weight = 1 / points.losses
    small = np.exp(-EXPONENTS[:, None] * (np.log(points.parameters) - centre.log_parameters)) * weight
    short = np.exp(-EXPONENTS[:, None] * (np.log(points.tokens) - centre.log_tokens)) * weight
    products = np.empty((len(EXPONENTS), len(EXPONENTS), 3, 3))
    products[..., 0, 0] = (small * small).sum(axis=1)[:, None]
    products[..., 1, 1] = (short * short).sum(axis=1)
    products[..., 2, 2] = weight @ weight
    products[..., 0, 1] = products[..., 1, 0] = small @ short.T
    products[..., 0, 2] = products[..., 2, 0] = (small @ weight)[:, None]
    products[..., 1, 2] = products[..., 2, 1] = short @ weight
    right = np.empty((len(EXPONENTS), len(EXPONENTS), 3))
    right[..., 0], right[..., 1], right[..., 2] = small.sum(axis=1)[:, None], short.sum(axis=1), weight.sum()
    ridge = 1e-13 * np.einsum("abpp->ab", products)[..., None, None] * np.eye(3)
    return np.linalg.solve(products + ridge, right[..., None])[..., 0]
