"""How well a study will predict, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megahybrid.errors import UserError
from megahybrid.study.cells import Cell
from megahybrid.study.file import Study
from megahybrid.study.law.bootstrap import SHARED, SHARED_PRIOR, Noise, interval, posterior, unit_noise
from megahybrid.study.law.fit import DELTA, LEAST_RATIO, LEAST_RUNS
from megahybrid.study.law.law import CONDITION_LIMIT, Array, Centre, Law, condition, jacobian

PRIOR = Law(A=482.01, B=2085.43, E=1.8172, alpha=0.3478, beta=0.3658)
"""Besiroglu et al., "Chinchilla Scaling: A replication attempt", arXiv 2404.10102."""

_STUDIES, _REPLICATES = 200, 200
"""That are made up, and drawings of each one's noise."""


@dataclass(frozen=True)
class Runs:
    """A kind's runs that will be fitted: [runs] each; trunks are 0, 1, …."""

    parameters: Array
    tokens: Array
    trunks: NDArray[np.int_]

    @property
    def centre(self) -> Centre:
        """Of their logarithms."""
        return Centre.of(self.parameters, self.tokens)

    @property
    def jacobian(self) -> Array:
        """Of their log losses at PRIOR."""
        return jacobian(PRIOR, self.parameters, self.tokens, self.centre)


@dataclass(frozen=True)
class Precision:
    """What the fit to a kind's runs is expected to know, if PRIOR were its law.

    Attributes:
        condition: of JᵀJ, see megahybrid.study.law.law.
        a_opt: half of the 95 % interval of the exponent of the best size, N* ~ C^a.
        losses: half of the 95 % interval of the loss of one run at every target, relative.
    """

    condition: float
    a_opt: float
    losses: Array


def huber_efficiency(noise: float, delta: float = DELTA) -> float:
    """Of the estimator that minimises Huber's loss of that delta, for normal noise of that standard deviation: the
    variance of least squares by its own, from 2 / pi where delta is small (the median's) to 1. The expectation of the
    slope of its score, squared, by that of the squared score (Huber, "Robust Estimation of a Location Parameter", 1964,
    section 6)."""
    c = delta / noise
    below, density = (1 + math.erf(c / math.sqrt(2))) / 2, math.exp(-c * c / 2) / math.sqrt(2 * math.pi)
    return (2 * below - 1) ** 2 / (2 * (c * c * (1 - below) + below - 0.5 - c * density))


def precisions(
    kinds: Sequence[Runs], targets: Sequence[Sequence[tuple[float, float]]], noise: float
) -> list[Precision]:
    """How wide the intervals of `fit` are on average over studies that are made up: their noise is normal, and the part
    of it that runs of a trunk share is drawn from SHARED_PRIOR; from what the fit would leave of it the noise is drawn
    again, as the bootstrap does, and the law follows it linearly, at PRIOR, and as far as by Huber's loss, which knows
    less than least squares where noise is above its delta.

    Args:
        kinds: whose laws can be told apart.
        targets: of each kind, pairs of parameters and tokens.
        noise: standard deviation of a run's loss, relative.
    """
    rng = np.random.default_rng(0)
    slopes = [each.jacobian for each in kinds]
    noises = [Noise(slope, each.trunks) for slope, each in zip(slopes, kinds, strict=True)]
    moves = [_moves(each, slope, wanted) for each, slope, wanted in zip(kinds, slopes, targets, strict=True)]
    wider = huber_efficiency(noise) ** -0.5
    widths = [np.zeros(len(each)) for each in moves]
    for _ in range(_STUDIES):
        shared = rng.choice(SHARED, 1, p=SHARED_PRIOR)
        losses = [unit_noise(each.trunks, shared, rng)[0] for each in kinds]
        known = posterior(model.likelihood(drawn) for model, drawn in zip(noises, losses, strict=True))
        for width, model, drawn, move in zip(widths, noises, losses, moves, strict=True):
            again, own = model.draw(drawn, known, _REPLICATES, rng)
            off = wider * (again @ move.T)
            off[:, 1:] += own[:, None]
            width += [np.ptp(interval(each)) / 2 / _STUDIES for each in off.T]
    return [
        Precision(condition(slope), noise * float(width[0]), noise * width[1:])
        for slope, width in zip(slopes, widths, strict=True)
    ]


def _moves(runs: Runs, slopes: Array, targets: Sequence[tuple[float, float]]) -> Array:
    """By how much a_opt and the log losses at targets move with the log loss of each run: [1 + targets, runs]."""
    alpha, beta = PRIOR.alpha, PRIOR.beta
    a_opt = np.array([0, 0, 0, -beta, alpha]) / (alpha + beta) ** 2
    at_targets = jacobian(PRIOR, *np.array(targets).reshape(-1, 2).T, runs.centre)
    return np.vstack([a_opt, at_targets]) @ np.linalg.pinv(slopes)


def expect(study: Study, cells: Sequence[Cell]) -> dict[str, Precision]:
    """The precision of every kind at the study's targets and then at what it holds out, without what is given up.
    Raises UserError for a design that cannot tell the law's terms apart."""
    kinds, targets = [], []
    for kind in study.kinds:
        own = [cell for cell in cells if cell.kind == kind and cell.role != "tune" and cell.name not in study.give_up]
        kinds.append(_runs(kind, [cell for cell in own if not cell.held_out]))
        held = [(cell.parameters, cell.tokens) for cell in own if cell.held_out]
        targets.append([*((each.parameters, each.tokens) for each in study.targets), *held])
    return dict(zip(study.kinds, precisions(kinds, targets, study.noise), strict=True))


def _runs(kind: str, cells: Sequence[Cell]) -> Runs:
    """Those of a kind, with the tokens that they are asked for: what whole steps make of them differs by chance. Raises
    UserError where they cannot tell the law's terms apart."""
    parameters = np.array([cell.parameters for cell in cells])
    tokens = np.array([cell.asked / cell.flops_per_token for cell in cells])
    runs = Runs(parameters, tokens, np.unique([cell.trunk for cell in cells], return_inverse=True)[1])
    if fault := _fault(runs):
        raise UserError(f"{kind}: {fault}.")
    return runs


def _fault(runs: Runs) -> str | None:
    """Why they cannot tell what size does from what data do, and what to change."""
    sizes, ratios = len(set(runs.parameters)), runs.tokens / runs.parameters
    if sizes == 1:
        return "all its runs have one size, which says nothing of others; add sizes"
    if sizes and ratios.max() < LEAST_RATIO * ratios.min():
        return (
            f"all its runs have about {ratios.mean():.3g} tokens a parameter, one ratio only, which cannot tell what "
            "size does from what data do; add budgets of other ratios, such as tokens_per_parameter: [10, 20, 40]"
        )
    if len(ratios) < LEAST_RUNS:
        return f"it has {len(ratios)} runs to fit the law to, which needs {LEAST_RUNS}; add sizes or budgets"
    if (number := condition(runs.jacobian)) > CONDITION_LIMIT:
        return (
            f"its runs are too much alike to tell what size does from what data do (condition number {number:.0e}, "
            f"above {CONDITION_LIMIT:.0e}); spread sizes and budgets"
        )
    return None
