"""A parabola a budget and a line through their lowest points (Hoffmann et al. 2022, approach 2): a cross-check of the
law that is biased even without noise, since a budget's losses are no parabola, nor symmetrical about their lowest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from megahybrid.study.law.frontier import Frontier
from megahybrid.study.law.law import Array

SAME_COMPUTE = 1.1
"""Runs whose FLOPs differ by less than this factor have one budget."""

LEAST_SIZES = 4
"""Of a budget, for a parabola and something to spare."""


@dataclass(frozen=True)
class Parabola:
    """Of something over the logarithm of x.

    Attributes:
        coefficients: over log(x / centre), highest power first.
        lowest: the x of its lowest point, where that is between the smallest and the largest x; else None.
    """

    coefficients: Array
    centre: float
    lowest: float | None

    @classmethod
    def through(cls, x: ArrayLike, y: ArrayLike) -> Parabola:
        """By least squares, of three different x at least."""
        centre = float(np.exp(np.log(x).mean()))
        bend, slope, level = np.polyfit(np.log(np.divide(x, centre)), y, 2)
        lowest = float(centre * np.exp(-slope / (2 * bend))) if bend > 0 else 0.0
        return cls(np.array([bend, slope, level]), centre, lowest if min(x) < lowest < max(x) else None)

    def __call__(self, x: ArrayLike) -> Array:
        """Its values."""
        return np.polyval(self.coefficients, np.log(np.divide(x, self.centre)))


@dataclass(frozen=True)
class Lowest:
    """What the parabolas say.

    Attributes:
        flops: of each budget, ascending: [budgets].
        parameters: where its parabola is lowest: [budgets].
        slope, offset: log parameters = offset + slope · log flops.
    """

    flops: Array
    parameters: Array
    slope: float
    offset: float

    def best(self, flops: float) -> float:
        """N at some FLOPs."""
        return float(np.exp(self.offset + self.slope * np.log(flops)))


def budgets(flops: Array) -> list[Array]:
    """The indices of the runs of each budget, ascending."""
    order, found, start = np.argsort(flops, kind="stable"), [], 0
    for place in range(1, len(order) + 1):
        if place == len(order) or flops[order[place]] > SAME_COMPUTE * flops[order[start]]:
            found.append(order[start:place])
            start = place
    return found


def lowest(parameters: Array, flops: Array, losses: Array) -> Lowest | None:
    """Parabolas of loss over log parameters, of budgets with enough sizes and the lowest point between them; None where
    fewer than two have."""
    found = []
    for chosen in budgets(flops):
        if len(np.unique(np.round(np.log(parameters[chosen]), 3))) < LEAST_SIZES:
            continue
        best = Parabola.through(parameters[chosen], losses[chosen]).lowest
        if best is not None:
            found.append((np.log(flops[chosen]).mean(), np.log(best)))
    if len(found) < 2:
        return None
    log_flops, log_parameters = np.array(found).T
    slope, offset = np.polyfit(log_flops, log_parameters, 1)
    return Lowest(np.exp(log_flops), np.exp(log_parameters), float(slope), float(offset))


def bias(frontier: Frontier, parameters: Array, flops: Array, at: float) -> dict[str, float] | None:
    """What approach 2 makes of the law's own losses, without noise, at runs of these sizes and FLOPs: errors of N and D
    at some FLOPs, relative to the law's, and of the exponent."""
    losses = frontier.law.loss(parameters, flops / frontier.cost(parameters))
    found = lowest(parameters, flops, losses)
    if found is None:
        return None
    best = found.best(at)
    return {
        "flops": at,
        "parameters": float(best / frontier.parameters(at) - 1),
        "tokens": float(at / frontier.cost(best) / frontier.tokens(at) - 1),
        "a_opt": float(found.slope - frontier.a_opt),
    }
