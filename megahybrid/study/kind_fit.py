"""The law of one kind of model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megahybrid.study.law.bootstrap import ENOUGH_TRUNKS, Noise, Replicates, bootstrap, interval, posterior
from megahybrid.study.law.fit import LEAST_RATIO, LEAST_RUNS, Fit, NoLaw, Points, fit
from megahybrid.study.law.frontier import Frontier, TokenCost
from megahybrid.study.law.law import CONDITION_LIMIT, Array
from megahybrid.study.table import Run


@dataclass(frozen=True)
class KindFit:
    """What a kind's runs say, with one way of counting parameters.

    Attributes:
        name: the kind's.
        count: the column of parameters.
        fit: of its law.
        flops, trunks: of the runs that it was fitted to, [runs].
        cost: of a token.
        shared: how likely trunks share which part of the noise, by all kinds; None without a bootstrap.
        replicates: of the bootstrap; None without one.
    """

    name: str
    count: str
    fit: Fit
    flops: Array
    trunks: Array
    cost: TokenCost
    shared: Array | None = None
    replicates: Replicates | None = None

    @property
    def frontier(self) -> Frontier:
        """Where compute is spent best."""
        return Frontier(self.fit.law, self.cost)

    @property
    def frontiers(self) -> Frontier:
        """Of the replicates."""
        return Frontier(self.replicates.law, self.cost)

    def interval(self, values: Callable[[], Array]) -> list[float] | None:
        """Of what `values` gives for each replicate; None without any."""
        return interval(values()) if self.replicates else None


def fit_kind(runs: Sequence[Run], name: str, count: str = "parameters") -> KindFit:
    """Fit the law to the runs of a kind that are fitted. Raises NoLaw where they cannot tell its terms apart.

    Args:
        runs: of all kinds.
        name: the kind's.
        count: the column of parameters.
    """
    own = [run for run in runs if run.kind == name]
    chosen = [run for run in own if run.fitted]
    if len(chosen) < LEAST_RUNS:
        raise NoLaw(
            f"{name} has {len(chosen)} runs to fit, and the law needs {LEAST_RUNS} at least; finish or add some."
        )
    points = Points(*(column(chosen, each) for each in (count, "tokens", "loss")))
    ratios = points.tokens / points.parameters
    if ratios.max() < LEAST_RATIO * ratios.min():
        raise NoLaw(
            f"All runs of {name} have about {ratios.mean():.3g} tokens a parameter, which cannot tell the law's terms "
            "apart; add runs with fewer and with more."
        )
    try:
        fitted = fit(points)
    except NoLaw as error:
        raise NoLaw(f"{name} cannot be fitted: {error}") from None
    if not fitted.condition <= CONDITION_LIMIT:
        raise NoLaw(
            f"The runs of {name} cannot tell the law's terms apart (condition number {fitted.condition:.1e}, above "
            f"{CONDITION_LIMIT:.0e}; the fit has alpha {fitted.law.alpha:.2g} and beta {fitted.law.beta:.2g}); add "
            "sizes, and budgets with fewer and with more tokens a parameter."
        )
    trunks = np.unique([run.trunk for run in chosen], return_inverse=True)[1]
    cost = TokenCost.of(column(own, count), column(own, "flops") / column(own, "tokens"))
    return KindFit(name, count, fitted, column(chosen, "flops"), trunks, cost)


def with_replicates(kinds: Sequence[KindFit], replicates: int, shared: Array | None = None) -> list[KindFit]:
    """The same with a bootstrap; what trunks share of the noise, where not given, is learnt from all kinds together."""
    if not replicates:
        return list(kinds)
    if shared is None:
        few = (kind for kind in kinds if kind.trunks.max() + 1 < ENOUGH_TRUNKS)
        shared = posterior(Noise(kind.fit.jacobian, kind.trunks).likelihood(kind.fit.residuals) for kind in few)
    drawn = [
        bootstrap(kind.fit, kind.trunks, replicates, np.random.default_rng(seed), shared)
        for seed, kind in enumerate(kinds)
    ]
    return [replace(kind, shared=shared, replicates=each) for kind, each in zip(kinds, drawn, strict=True)]


def column(runs: Sequence[Run], name: str) -> Array:
    """A number of all runs: [runs]."""
    return np.array([getattr(run, name) for run in runs], dtype=float)
