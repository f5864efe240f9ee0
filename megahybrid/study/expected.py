"""How well a study will predict, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megahybrid.errors import UserError
from megahybrid.study.cells import Cell
from megahybrid.study.file import Study
from megahybrid.study.law.fit import LEAST_RUNS
from megahybrid.study.law.law import CONDITION_LIMIT, Array, Centre, Law, condition, jacobian

PRIOR = Law(A=482.01, B=2085.43, E=1.8172, alpha=0.3478, beta=0.3658)
"""Besiroglu et al., "Chinchilla Scaling: A replication attempt", arXiv 2404.10102."""
_NORMAL = 1.959964
"""Standard deviations that hold 95 %."""


@dataclass(frozen=True)
class Precision:
    """What the fit to a kind's runs is expected to know, if PRIOR were its law and all runs had independent noise.

    Attributes:
        condition: of JᵀJ, see megahybrid.study.law.law.
        a_opt: half of the 95 % interval of the exponent of the best size, N* ~ C^a.
        losses: half of the 95 % interval of the law's loss at every target, relative.
    """

    condition: float
    a_opt: float
    losses: Array


def precision(
    parameters: Sequence[float], tokens: Sequence[float], targets: Sequence[tuple[float, float]], noise: float
) -> Precision:
    """Gauss-Newton's covariance at PRIOR.

    Args:
        parameters, tokens: [runs].
        targets: pairs of parameters and tokens.
        noise: standard deviation of a run's loss, relative.
    """
    centre = Centre.of(parameters, tokens)
    slopes = jacobian(PRIOR, parameters, tokens, centre)
    number = condition(slopes)
    if not number <= CONDITION_LIMIT:
        return Precision(number, np.inf, np.full(len(targets), np.inf))
    root = np.linalg.pinv(slopes) * noise * _NORMAL  # its product with its transpose is the covariance
    alpha, beta = PRIOR.alpha, PRIOR.beta
    of_a_opt = np.array([0, 0, 0, -beta, alpha]) / (alpha + beta) ** 2
    at_targets = jacobian(PRIOR, *np.array(targets).reshape(-1, 2).T, centre)
    return Precision(number, float(np.linalg.norm(of_a_opt @ root)), np.linalg.norm(at_targets @ root, axis=1))


def expect(study: Study, cells: Sequence[Cell]) -> dict[str, Precision]:
    """The precision of every kind at the study's targets and then at what it holds out, there of the run's own loss,
    which has noise, too. Raises UserError for a design that cannot tell the law's terms apart."""
    found = {}
    for kind in study.kinds:
        own = [cell for cell in cells if cell.kind == kind and cell.role != "tune"]
        fitted = [cell for cell in own if not cell.held_out]
        held = [(cell.parameters, cell.tokens) for cell in own if cell.held_out]
        targets = [*((each.parameters, each.tokens) for each in study.targets), *held]
        parameters, tokens = ([getattr(cell, name) for cell in fitted] for name in ("parameters", "tokens"))
        each = precision(parameters, tokens, targets, study.noise)
        if each.condition > CONDITION_LIMIT:
            raise UserError(
                f"{kind}: {_what_is_alike(parameters, tokens)} (condition number {each.condition:.0e}, above "
                f"{CONDITION_LIMIT:.0e})."
            )
        if len(fitted) < LEAST_RUNS:
            raise UserError(
                f"{kind} has {len(fitted)} runs to fit the law to, which needs {LEAST_RUNS}; add sizes or budgets."
            )
        own_noise = np.repeat([0, _NORMAL * study.noise], [len(study.targets), len(held)])
        found[kind] = replace(each, losses=np.hypot(each.losses, own_noise))
    return found


def _what_is_alike(parameters: Sequence[float], tokens: Sequence[float]) -> str:
    """Why runs cannot tell what size does from what data do, and what to change."""
    ratios = np.divide(tokens, parameters)
    if len(set(parameters)) == 1:
        return "all its runs have one size, which says nothing of others; add sizes"
    if max(ratios) < 1.5 * min(ratios):
        return (
            f"all its runs have about {np.mean(ratios):.3g} tokens a parameter, one ratio only, which cannot tell what "
            "size does from what data do; add budgets of other ratios, such as tokens_per_parameter: [10, 20, 40]"
        )
    return "its runs are too few or too much alike to tell what size does from what data do; spread sizes and budgets"
