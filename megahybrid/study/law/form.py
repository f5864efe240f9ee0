"""Whether losses have the law's form, and whether a fit hangs on a few of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megahybrid.study.law.fit import LEAST_RUNS, Fit, NoLaw, fit

FALSE_ALARMS = 0.02
"""Of studies whose losses have the form, all tests together."""

NOISE = 0.003
"""Standard deviation of a run's loss, relative, where nothing else is known."""

TOLERATED = 2.0
"""How many times as much noise as expected is no sign of another form."""

INFLUENCE = 1.0
"""By how many of its standard errors an exponent has to move, where the largest losses are unlikely besides."""

UNLIKELY = 0.002
"""Of the largest losses, by what the other runs say of the noise."""

KNOWN = 10**9
"""Degrees of freedom of a variance that is not estimated."""


@dataclass(frozen=True)
class Misfit:
    """A test that a kind's losses failed.

    Attributes:
        kind: 0, 1, ….
        test: "repeats", "others", "noise" or "bend".
        chance: of as much or more where they have the form.
        size: of what the law misses, relative to the loss, root mean square.
        along: for a bend, what the residuals bend with.
    """

    kind: int
    test: str
    chance: float
    size: float
    along: str = ""


@dataclass(frozen=True)
class _Rests:
    """Sums of squares of a fit's residuals, and their degrees of freedom."""

    law: float  # that the law leaves
    law_freedom: int
    bend: float  # that squares of log N and log D, and their product, take from it
    bend_freedom: int
    along: str
    seeds: float  # of runs about the mean of those of equal parameters and tokens
    seeds_freedom: int


def misfits(fits: Sequence[Fit], noise: float = NOISE) -> Iterator[Misfit]:
    """Four F tests of each kind, by least squares about the fit, at a level that all tests share.

    - repeats: what the law leaves against what runs that differ in their seed alone do, where there are any;
    - others: what the law leaves against what it leaves of the other kinds, where there are any; runs of a trunk share
      noise and tell less of it than they seem to, so it may be twice as much;
    - noise: what the law leaves against `noise`, of which it may be twice as much, too;
    - bend: whether squares of log N and log D, or their product, explain residuals; this sees a law that bends where
      nothing was repeated.

    For the bend, noise is taken to be alike in all kinds.
    """
    rests = [_rests(each) for each in fits]
    seeds, seeds_freedom = sum(each.seeds for each in rests), sum(each.seeds_freedom for each in rests)
    unbent = sum(each.law - each.bend for each in rests)
    unbent_freedom = sum(each.law_freedom - each.bend_freedom for each in rests)
    found = []
    for kind, each in enumerate(rests):
        others = (
            TOLERATED**2 * (sum(other.law for other in rests) - each.law),
            sum(other.law_freedom for other in rests) - each.law_freedom,
        )
        tests = (
            ("repeats", each.law - each.seeds, each.law_freedom - each.seeds_freedom, seeds, seeds_freedom, ""),
            ("others", each.law, each.law_freedom, *others, ""),
            ("noise", each.law, each.law_freedom, KNOWN * (TOLERATED * noise) ** 2, KNOWN, ""),
            ("bend", each.bend, each.bend_freedom, unbent, unbent_freedom, each.along),
        )
        for test, squares, freedom, against, against_freedom, along in tests:
            size = float(np.sqrt(max(squares, 0) / len(fits[kind].points)))
            found.append(Misfit(kind, test, chance(squares, freedom, against, against_freedom), size, along))
    level = FALSE_ALARMS / max(1, sum(not np.isnan(each.chance) for each in found))
    yield from (each for each in found if each.chance < level)


def chance(squares: float, freedom: int, noise: float, noise_freedom: int) -> float:
    """That F is as large or larger; nan where there is nothing to compare."""
    if freedom < 1 or noise_freedom < 1:
        return float("nan")
    if noise <= 1e-24:
        return 1.0
    drawn = np.random.default_rng(0).f(freedom, noise_freedom, 100_000)
    return float((1 + (drawn >= squares / freedom / (noise / noise_freedom)).sum()) / (1 + len(drawn)))


def _rests(fitted: Fit) -> _Rests:
    runs, parameters = fitted.jacobian.shape
    basis = np.linalg.qr(fitted.jacobian)[0]
    n, d = -fitted.points.terms[0, :, -2], -fitted.points.terms[1, :, -1]
    left = fitted.residuals - basis @ (basis.T @ fitted.residuals)
    bends = np.column_stack([n * n, n * d, d * d])
    bends -= basis @ (basis.T @ bends)
    directions, sizes, _ = np.linalg.svd(bends, full_matrices=False)
    directions = directions[:, sizes > 1e-6 * np.sqrt(runs)][:, : max(0, runs - parameters - 2)]
    explained = bends / np.maximum(np.linalg.norm(bends, axis=0), 1e-300)
    names = ("parameters", "parameters and tokens", "tokens")
    seeds, seeds_freedom = _seeds(fitted)
    return _Rests(
        *(float(left @ left), runs - parameters),
        *(float(((directions.T @ left) ** 2).sum()), directions.shape[1]),
        names[int(np.abs(explained.T @ left).argmax())],
        *(seeds, seeds_freedom),
    )


def _seeds(fitted: Fit) -> tuple[float, int]:
    """Squares of log losses about the mean of runs of equal parameters and tokens."""
    places = np.column_stack([fitted.points.parameters, fitted.points.tokens])
    cell = np.unique(places, axis=0, return_inverse=True)[1].reshape(-1)
    losses = np.log(fitted.points.losses)
    means = (np.bincount(cell, losses) / np.bincount(cell))[cell]
    return float(((losses - means) ** 2).sum()), len(losses) - int(cell.max()) - 1


@dataclass(frozen=True)
class Influence:
    """An exponent that moves when the largest losses are left out."""

    name: str
    runs: int
    within: float
    without: float


def influence(fitted: Fit) -> Influence | None:
    """Whether the largest losses, a fiftieth of them and at least one, are not what the others foretell, by an F test,
    and move an exponent by more than its standard error."""
    out = max(1, round(len(fitted.points) / 50))
    kept = np.sort(np.argsort(fitted.points.losses, kind="stable")[:-out])
    if len(kept) < LEAST_RUNS:
        return None
    try:
        other = fit(fitted.points[kept])
    except NoLaw:
        return None
    left, with_largest = _rests(other), _rests(fitted)
    if chance(with_largest.law - left.law, out, left.law, left.law_freedom) > UNLIKELY:
        return None
    variances = np.diag(np.linalg.pinv(other.jacobian.T @ other.jacobian, rcond=1e-14))[-2:]
    errors = np.sqrt(variances * left.law / left.law_freedom)
    moved = np.abs(other.theta - fitted.theta)[-2:] / np.maximum(errors, 1e-9)
    most = -2 + int(moved.argmax())
    if moved[most] < INFLUENCE:
        return None
    return Influence(("alpha", "beta")[most], out, float(fitted.theta[most]), float(other.theta[most]))
