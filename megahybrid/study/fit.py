"""`megahybrid study fit`: from a table of runs to fit.json."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megahybrid.errors import UserError
from megahybrid.files import write_json
from megahybrid.study.law import approach2
from megahybrid.study.law.bootstrap import (
    ENOUGH_TRUNKS,
    REPLICATES,
    Noise,
    Replicates,
    bootstrap,
    interval,
    posterior,
)
from megahybrid.study.law.fit import EXPONENTS, LEAST_RUNS, Fit, Points
from megahybrid.study.law.fit import fit as fit_law
from megahybrid.study.law.form import NOISE, influence, misfits
from megahybrid.study.law.frontier import Frontier, TokenCost, multiplier
from megahybrid.study.law.law import CONDITION_LIMIT, Array, Law
from megahybrid.study.law.rollout import rollout
from megahybrid.study.table import Table, read_table

DELTAS = {"1e-4": 1e-4, "1e-2": 1e-2, "inf": math.inf}
"""Of Huber's loss, that the law is fitted with besides."""

LEAST_RATIO = 1.1
"""Between the most and the fewest tokens a parameter of a kind's runs."""

BARELY = 1e7
"""A condition number from which on a fit is warned of."""

BEYOND = 1e3
"""How far past the largest run, in compute, the best sizes are given,"""

A_DECADE = 4
"""at as many points a factor of 10."""

ROLLOUT_REPLICATES = 200
"""Of each step, at most."""

Target = tuple[float, float]
"""Parameters and tokens."""


@dataclass(frozen=True)
class _Kind:
    """The law of one kind of model, with one way of counting its parameters."""

    name: str
    fit: Fit
    flops: Array
    trunks: Array
    cost: TokenCost
    replicates: Replicates | None = None

    @property
    def frontier(self) -> Frontier:
        return Frontier(self.fit.law, self.cost)

    @property
    def frontiers(self) -> Frontier:
        """Of the replicates."""
        return Frontier(self.replicates.law, self.cost)

    def interval(self, values: Any) -> list[float] | None:
        """Of what `values`, called with nothing, gives for each replicate."""
        return interval(values()) if self.replicates else None


def fit(folder: Path, replicates: int = REPLICATES) -> dict[str, Any]:
    """Fit the law to a study's runs.csv and write its fit.json, which is returned.

    Raises UserError, and writes nothing, where there is no table or no law can be fitted to it.
    """
    from megahybrid.study.file import load_study

    if not (folder / "runs.csv").is_file():
        raise UserError(f"'{folder}' has no runs.csv: run `megahybrid study collect` first.")
    file = folder / "study.yaml"
    study = load_study(file) if file.is_file() else None
    targets = [(each.parameters, each.tokens) for each in study.targets] if study else []
    found = fit_table(read_table(folder / "runs.csv"), targets, replicates, study.noise if study else NOISE)
    write_json(folder / "fit.json", found)
    return found


def fit_table(
    table: Table, targets: Sequence[Target] = (), replicates: int = REPLICATES, noise: float = NOISE
) -> dict[str, Any]:
    """What fit.json holds; docs/scaling.md says what each part is.

    Args:
        table: the runs.
        targets: models whose loss every kind's law predicts.
        replicates: of the bootstrap; 0 for no intervals.
        noise: standard deviation that a run's loss is expected to have, relative.

    Raises UserError where no law can be fitted.
    """
    kinds = list(dict.fromkeys(table.kind.tolist()))
    fitted = _with_replicates([_fit_kind(table, kind, table.parameters) for kind in kinds], replicates)
    compute = _compute(table)
    found = {}
    for kind in fitted:
        found[kind.name] = _described(kind, compute) | {
            "predictions": list(_predictions(kind, table, table.parameters, targets)),
            "without_embedding": _without_embedding(table, kind.name, replicates, compute),
        }
    return _finite(
        {
            "rule": _rule(table),
            "kinds": found,
            "multipliers": {
                f"{fitted[0].name} vs {other.name}": list(_multipliers(fitted[0], other, compute))
                for other in fitted[1:]
            },
            "shared_exponents": _shared_exponents(fitted),
            "approach2": {kind.name: _approach2(kind) for kind in fitted},
            "rollout": {kind.name: list(_rollout(kind, replicates)) for kind in fitted},
            "warnings": list(_warnings(table, fitted, noise)),
        }
    )


def _fit_kind(table: Table, name: str, parameters: Array) -> _Kind:
    here = table.kind == name
    chosen = here & table.fitted
    runs = int(chosen.sum())
    if runs < LEAST_RUNS:
        raise UserError(f"{name} has {runs} runs to fit, and the law needs {LEAST_RUNS} at least; finish or add some.")
    points = Points(parameters[chosen], table.tokens[chosen], table.loss[chosen])
    ratios = points.tokens / points.parameters
    if ratios.max() < LEAST_RATIO * ratios.min():
        raise UserError(
            f"All runs of {name} have about {ratios.mean():.3g} tokens a parameter, which cannot tell the law's terms "
            "apart; add runs with fewer and with more."
        )
    try:
        fitted = fit_law(points)
    except UserError as error:
        raise UserError(f"{name} cannot be fitted: {error}") from None
    if not fitted.condition <= CONDITION_LIMIT:
        raise UserError(
            f"The runs of {name} cannot tell the law's terms apart (condition number {fitted.condition:.1e}, above "
            f"{CONDITION_LIMIT:.0e}); add sizes, and runs with fewer and with more tokens a parameter."
        )
    trunks = np.unique(table.trunk[chosen], return_inverse=True)[1]
    cost = TokenCost.of(parameters[here], table.flops[here] / table.tokens[here])
    return _Kind(name, fitted, table.flops[chosen], trunks, cost)


def _with_replicates(kinds: Sequence[_Kind], replicates: int) -> list[_Kind]:
    """The same with a bootstrap; what trunks share of the noise is learnt from all kinds together."""
    if not replicates:
        return list(kinds)
    few = (kind for kind in kinds if kind.trunks.max() + 1 < ENOUGH_TRUNKS)
    shared = posterior(Noise(kind.fit.jacobian, kind.trunks).likelihood(kind.fit.residuals) for kind in few)
    return [
        replace(kind, replicates=bootstrap(kind.fit, kind.trunks, replicates, np.random.default_rng(seed), shared))
        for seed, kind in enumerate(kinds)
    ]


def _compute(table: Table) -> Array:
    """FLOPs at which the best sizes are given: from the smallest run, through the largest, and beyond."""
    flops = table.flops[table.fitted]
    decades = math.log10(flops.max() * BEYOND / flops.min())
    return np.geomspace(flops.min(), flops.max() * BEYOND, math.ceil(A_DECADE * decades) + 1)


def _described(kind: _Kind, compute: Array) -> dict[str, Any]:
    fitted = kind.fit
    return {
        **_numbers(fitted.law, kind.cost),
        "objective": fitted.objective,
        "gradient_norm": fitted.gradient_norm,
        "condition": fitted.condition,
        "runs": len(fitted.points),
        "flops_per_token": kind.cost._asdict(),
        "delta": {name: _with_delta(kind, delta) for name, delta in DELTAS.items()},
        "intervals": _intervals(kind),
        "optimum": list(_optimum(kind, compute)),
    }


def _numbers(law: Law, cost: TokenCost) -> dict[str, Any]:
    return {name: getattr(law, name) for name in ("A", "B", "E", "alpha", "beta")} | {
        "a_opt": Frontier(law, cost).a_opt
    }


def _with_delta(kind: _Kind, delta: float) -> dict[str, Any] | None:
    try:
        fitted = fit_law(kind.fit.points, delta)
    except UserError:
        return None
    return _numbers(fitted.law, kind.cost) | {"objective": fitted.objective}


def _intervals(kind: _Kind) -> dict[str, list[float]]:
    if not kind.replicates:
        return {}
    return {name: interval(values) for name, values in _numbers(kind.replicates.law, kind.cost).items()}


def _optimum(kind: _Kind, compute: Array) -> Iterator[dict[str, Any]]:
    for flops in compute:
        yield {
            "flops": flops,
            **{name: getattr(kind.frontier, name)(flops) for name in ("parameters", "tokens", "loss")},
            "interval": kind.interval(lambda flops=flops: kind.frontiers.loss(flops)),
        }


def _predictions(kind: _Kind, table: Table, parameters: Array, targets: Sequence[Target]) -> Iterator[dict[str, Any]]:
    """Of runs that were held out, and of targets; an interval is that of one run, with its noise."""
    for place in np.flatnonzero((table.kind == kind.name) & table.held_out):
        made = _predicted(kind, parameters[place], table.tokens[place], table.flops[place])
        actual = table.loss[place] if table.done[place] else None
        covered = (
            None if actual is None or not kind.replicates else made["interval"][0] <= actual <= made["interval"][1]
        )
        error = None if actual is None else actual / made["loss"] - 1
        yield made | {"cell": table.cell[place] or None, "actual": actual, "error": error, "covered": covered}
    for size, tokens in targets:
        made = _predicted(kind, size, tokens, kind.cost(size) * tokens)
        yield made | {"cell": None, "actual": None, "error": None, "covered": None}


def _predicted(kind: _Kind, parameters: float, tokens: float, flops: float) -> dict[str, Any]:
    return {
        "parameters": parameters,
        "tokens": tokens,
        "flops": flops,
        "loss": kind.fit.law.loss(parameters, tokens),
        "interval": kind.interval(lambda: kind.replicates.loss_of_a_run(parameters, tokens)),
    }


def _without_embedding(table: Table, name: str, replicates: int, compute: Array) -> dict[str, Any] | None:
    """The same fit with parameters counted without embeddings; None where that is not known, or cannot be fitted."""
    if table.parameters_without_embedding is None:
        return None
    try:
        fitted = _fit_kind(table, name, table.parameters_without_embedding)
    except UserError:
        return None
    (kind,) = _with_replicates([fitted], replicates)
    made = _predictions(kind, table, table.parameters_without_embedding, ())
    return _described(kind, compute) | {"predictions": list(made)}


def _multipliers(base: _Kind, other: _Kind, compute: Array) -> Iterator[dict[str, Any]]:
    """Where they are finite: at much compute a kind may never reach the other's loss."""
    for flops in compute:
        times = float(multiplier(base.frontier, other.frontier, flops))
        ends = interval(multiplier(base.frontiers, other.frontiers, flops)) if base.replicates else None
        if all(math.isfinite(each) and each > 0 for each in (times, *(ends or ()))):
            yield {"flops": flops, "multiplier": times, "interval": ends}


def _shared_exponents(kinds: Sequence[_Kind]) -> dict[str, Any] | None:
    """A fit in which kinds differ in A, B and E alone; None for one kind, or where none can be fitted."""
    if len(kinds) < 2:
        return None
    runs = [kind.fit.points for kind in kinds]
    points = Points(
        *(np.concatenate([getattr(each, name) for each in runs]) for name in ("parameters", "tokens", "losses")),
        np.repeat(np.arange(len(runs)), [len(each) for each in runs]),
    )
    try:
        fitted = fit_law(points)
    except UserError:
        return None
    laws = fitted.laws
    return {
        "alpha": laws[0].alpha,
        "beta": laws[0].beta,
        "objective": fitted.objective,
        "objective_of_own_exponents": sum(kind.fit.objective for kind in kinds),
        "condition": fitted.condition,
        "kinds": {
            kind.name: {name: getattr(law, name) for name in ("A", "B", "E")}
            for kind, law in zip(kinds, laws, strict=True)
        },
    }


def _approach2(kind: _Kind) -> dict[str, Any] | None:
    """The cross-check, with its own error on the fitted law at ten times the largest compute; None where budgets have
    too few sizes."""
    points = kind.fit.points
    found = approach2.lowest(points.parameters, kind.flops, points.losses)
    if found is None:
        return None
    at = float(10 * kind.flops.max())
    return {
        "a_opt": found.slope,
        "budgets": [
            {"flops": flops, "parameters": parameters}
            for flops, parameters in zip(found.flops, found.parameters, strict=True)
        ],
        "at": {"flops": at, "parameters": found.best(at), "tokens": at / kind.cost(found.best(at))},
        "law_at": {"parameters": kind.frontier.parameters(at), "tokens": kind.frontier.tokens(at)},
        "bias": approach2.bias(kind.frontier, points.parameters, kind.flops, at),
    }


def _rollout(kind: _Kind, replicates: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    for step in rollout(kind.fit.points, kind.flops, kind.trunks, min(replicates, ROLLOUT_REPLICATES), rng):
        yield {
            "flops": step.flops,
            "fitted": step.fitted,
            "predicted": len(step.errors),
            "error": step.errors.mean(),
            "largest": step.errors[np.abs(step.errors).argmax()],
            "covered": None if step.covered is None else int(step.covered.sum()),
        }


def _rule(table: Table) -> str:
    fitted = int(table.fitted.sum())
    why = np.where(table.state != "done", table.state, np.where(table.excluded != "", table.excluded, "held out"))
    reasons = Counter(str(each) for each in why[~table.fitted])
    left = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    second = "".join(f" {cell} is {first} again at half the rate." for first, cell in _second_tries(table).items())
    return f"{fitted} of {len(table.loss)} runs are fitted; left out: {left or 'none'}.{second}"


def _second_tries(table: Table) -> dict[str, str]:
    """By the names of runs that diverged, those of the runs that are fitted in their place."""
    names, again = dict(zip(table.run, table.cell, strict=True)), table.fitted & (table.retry_of != "")
    pairs = zip(table.retry_of[again], table.cell[again], strict=True)
    return {str(names.get(first, first)): str(cell) for first, cell in pairs}


def _warnings(table: Table, kinds: Sequence[_Kind], noise: float) -> Iterator[str]:
    second = _second_tries(table)
    lacking = [str(each) for each in table.cell[(table.state != "done") & ~table.held_out] if each not in second]
    if lacking:
        few = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more runs" if len(lacking) > 5 else "")
        yield f"The fit lacks {few}, which {'has' if len(lacking) == 1 else 'have'} no loss."
    for kind in kinds:
        if kind.fit.condition > BARELY:
            number = f"condition number {kind.fit.condition:.1e}"
            yield f"The runs of {kind.name} barely tell the law's terms apart ({number})."
        for name, value in (("alpha", kind.fit.law.alpha), ("beta", kind.fit.law.beta)):
            if not EXPONENTS[0] < value < EXPONENTS[-1]:
                yield f"{name} of {kind.name} is {value:.2f}, and language models have 0.2 to 0.8: look at its runs."
        if moved := influence(kind.fit):
            yield (
                f"The fit of {kind.name} hangs on its {moved.runs} largest losses: without them {moved.name} is "
                f"{moved.without:.3f}, not {moved.within:.3f}; look at these runs."
            )
        if kind.replicates and (lost := np.isnan(kind.frontiers.a_opt).mean()) > 0.01:
            yield f"In {100 * lost:.0f} % of the replicates of {kind.name} loss does not fall with size or with tokens."
    for each in misfits([kind.fit for kind in kinds], noise):
        how = {
            "repeats": "miss the law by more than seeds differ",
            "others": "miss the law by far more than those of the other kinds do",
            "noise": f"miss the law by far more than the noise of {100 * noise:.2g} % that is expected",
            "bend": f"bend away from the law's form with {each.along}",
        }[each.test]
        size = f"{100 * each.size:.2g} % (root mean square), p = {each.chance:.1g}"
        yield f"The losses of {kinds[each.kind].name} {how}: {size}; intervals beyond its runs are too narrow."


def _finite(value: Any) -> Any:
    """For JSON: Python's own numbers, None for what is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
