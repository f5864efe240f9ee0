"""What the law would have said: fitted to the runs below some compute, it predicts those of the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megahybrid.study.law.approach2 import budgets
from megahybrid.study.law.bootstrap import bootstrap, interval
from megahybrid.study.law.fit import LEAST_RUNS, NoLaw, Points, fit
from megahybrid.study.law.law import CONDITION_LIMIT, Array

STEPS = 5
"""Of the largest budgets, that are predicted."""


@dataclass(frozen=True)
class Step:
    """The prediction of one budget.

    Attributes:
        flops: the largest of its runs.
        fitted: how many runs below it the law was fitted to.
        errors: actual over predicted loss, less 1: [runs].
        covered: whether the actual losses lie in their 95 % intervals: [runs]; None without a bootstrap.
    """

    flops: float
    fitted: int
    errors: Array
    covered: Array | None


def rollout(points: Points, flops: Array, trunks: Array, replicates: int, rng: np.random.Generator) -> Iterator[Step]:
    """A step for each of the largest budgets whose smaller ones identify the law, ascending."""
    for chosen in budgets(flops)[-STEPS:]:
        below = flops < flops[chosen].min()
        step = _step(points, flops, trunks, np.flatnonzero(below), chosen, replicates, rng)
        if step is not None:
            yield step


def _step(points, flops, trunks, below, chosen, replicates, rng) -> Step | None:
    if len(below) < LEAST_RUNS:
        return None
    try:
        fitted = fit(points[below])
    except NoLaw:
        return None
    if fitted.condition > CONDITION_LIMIT:
        return None
    new = points[chosen]
    covered = None
    if replicates:
        laws = bootstrap(fitted, trunks[below], replicates, rng)
        ends = [interval(laws.loss_of_a_run(*run)) for run in zip(new.parameters, new.tokens, strict=True)]
        low, high = np.array(ends).T
        covered = (low <= new.losses) & (new.losses <= high)
    errors = new.losses / fitted.law.loss(new.parameters, new.tokens) - 1
    return Step(float(flops[chosen].max()), len(below), errors, covered)
