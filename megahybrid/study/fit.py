"""`megahybrid study fit`: from a table of runs to fit.json."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from megahybrid.errors import UserError
from megahybrid.files import write_json
from megahybrid.study.file import Study, TargetConfig
from megahybrid.study.fit_warnings import rule, warnings
from megahybrid.study.kind_fit import KindFit, column, fit_kind, with_replicates
from megahybrid.study.law import approach2
from megahybrid.study.law.bootstrap import REPLICATES, interval
from megahybrid.study.law.fit import NoLaw, Points
from megahybrid.study.law.fit import fit as fit_law
from megahybrid.study.law.form import NOISE
from megahybrid.study.law.frontier import Frontier, TokenCost, multiplier
from megahybrid.study.law.law import Array, Law
from megahybrid.study.law.rollout import rollout
from megahybrid.study.table import Run, read_runs

DELTAS = {"1e-4": 1e-4, "1e-2": 1e-2, "inf": math.inf}
"""Of Huber's loss, that the law is fitted with besides."""

BEYOND = 1e3
"""How far past the largest run, in compute, the best sizes are given,"""

A_DECADE = 4
"""at as many points a factor of 10."""

ROLLOUT_REPLICATES = 200
"""Of each step, at most."""


def fit(study: Study, replicates: int = REPLICATES) -> dict[str, Any]:
    """Fit the law to a study's runs.csv and write its fit.json, which is returned.

    Raises UserError, and writes nothing, where there is no table, and NoLaw where none can be fitted to it.
    """
    table = study.folder / "runs.csv"
    if not table.is_file():
        raise UserError(f"'{study.folder}' has no runs.csv: run `megahybrid study collect` first.")
    found = fit_runs(read_runs(table), study.targets, replicates, study.noise)
    write_json(study.folder / "fit.json", found)
    return found


def fit_runs(
    runs: Sequence[Run], targets: Sequence[TargetConfig] = (), replicates: int = REPLICATES, noise: float = NOISE
) -> dict[str, Any]:
    """What fit.json holds; docs/scaling.md says what each part is.

    Args:
        runs: of all kinds; of two the one that comes first is what the other is compared with.
        targets: models whose loss every kind's law predicts.
        replicates: of the bootstrap; 0 for no intervals.
        noise: standard deviation that a run's loss is expected to have, relative.

    Raises NoLaw, which names every kind to which no law can be fitted.
    """
    fitted = with_replicates(_fit_kinds(runs), replicates)
    compute = _compute(runs)
    found = {}
    for kind in fitted:
        found[kind.name] = _described(kind, compute) | {
            "predictions": [*_held_out(kind, runs), *_targets(kind, targets)],
            "without_embedding": _without_embedding(runs, kind, replicates, compute),
        }
    return _finite(
        {
            "rule": rule(runs),
            "kinds": found,
            "multipliers": {
                f"{base.name} vs {other.name}": list(_multipliers(base, other, compute))
                for base, other in itertools.combinations(fitted, 2)
            },
            "shared_exponents": _shared_exponents(fitted),
            "approach2": {kind.name: _approach2(kind) for kind in fitted},
            "rollout": {kind.name: list(_rollout(kind, replicates)) for kind in fitted},
            "warnings": list(warnings(runs, fitted, noise)),
        }
    )


def _fit_kinds(runs: Sequence[Run]) -> list[KindFit]:
    """Each kind by itself. Raises NoLaw for all that cannot be fitted at once: kinds are compared, and what a part
    of them says would read as the study's answer."""
    fitted, faults = [], []
    for kind in dict.fromkeys(run.kind for run in runs):
        try:
            fitted.append(fit_kind(runs, kind))
        except NoLaw as error:
            faults.append(str(error))
    if faults and fitted:
        faults.append(f"({', '.join(kind.name for kind in fitted)} can be fitted.)")
    if faults:
        raise NoLaw(" ".join(faults))
    return fitted


def _compute(runs: Sequence[Run]) -> Array:
    """FLOPs at which the best sizes are given: from the smallest run, through the largest, and beyond."""
    flops = column([run for run in runs if run.fitted], "flops")
    decades = math.log10(flops.max() * BEYOND / flops.min())
    return np.geomspace(flops.min(), flops.max() * BEYOND, math.ceil(A_DECADE * decades) + 1)


def _described(kind: KindFit, compute: Array) -> dict[str, Any]:
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


def _with_delta(kind: KindFit, delta: float) -> dict[str, Any] | None:
    try:
        fitted = fit_law(kind.fit.points, delta)
    except NoLaw:
        return None
    return _numbers(fitted.law, kind.cost) | {"objective": fitted.objective}


def _intervals(kind: KindFit) -> dict[str, list[float]]:
    if not kind.replicates:
        return {}
    return {name: interval(values) for name, values in _numbers(kind.replicates.law, kind.cost).items()}


def _optimum(kind: KindFit, compute: Array) -> Iterator[dict[str, Any]]:
    for flops in compute:
        yield {
            "flops": flops,
            **{name: getattr(kind.frontier, name)(flops) for name in ("parameters", "tokens", "loss")},
            "interval": kind.interval(lambda flops=flops: kind.frontiers.loss(flops)),
        }


def _held_out(kind: KindFit, runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Predictions of runs that were held out; an interval is that of one run, with its noise."""
    for run in runs:
        if run.kind != kind.name or not run.held_out:
            continue
        made = _predicted(kind, getattr(run, kind.count), run.tokens, run.flops) | {"cell": run.cell or None}
        if not run.counts:
            yield made | {"actual": None, "error": None, "covered": None}
            continue
        covered = made["interval"] and made["interval"][0] <= run.loss <= made["interval"][1]
        yield made | {"actual": run.loss, "error": run.loss / made["loss"] - 1, "covered": covered}


def _targets(kind: KindFit, targets: Sequence[TargetConfig]) -> Iterator[dict[str, Any]]:
    """Likewise of models that nobody trains."""
    for each in targets:
        made = _predicted(kind, each.parameters, each.tokens, kind.cost(each.parameters) * each.tokens)
        yield made | {"cell": None, "actual": None, "error": None, "covered": None}


def _predicted(kind: KindFit, parameters: float, tokens: float, flops: float) -> dict[str, Any]:
    return {
        "parameters": parameters,
        "tokens": tokens,
        "flops": flops,
        "loss": kind.fit.law.loss(parameters, tokens),
        "interval": kind.interval(lambda: kind.replicates.loss_of_a_run(parameters, tokens)),
    }


def _without_embedding(runs: Sequence[Run], like: KindFit, replicates: int, compute: Array) -> dict[str, Any] | None:
    """The same fit with parameters counted without embeddings; None where that is not known, or cannot be fitted."""
    if any(math.isnan(run.parameters_without_embedding) for run in runs):
        return None
    try:
        fitted = fit_kind(runs, like.name, "parameters_without_embedding")
    except NoLaw:
        return None
    (kind,) = with_replicates([fitted], replicates, like.shared)
    return _described(kind, compute) | {"predictions": list(_held_out(kind, runs))}


def _multipliers(base: KindFit, other: KindFit, compute: Array) -> Iterator[dict[str, Any]]:
    """Where they are finite: at much compute a kind may never reach the other's loss."""
    for flops in compute:
        times = float(multiplier(base.frontier, other.frontier, flops))
        ends = interval(multiplier(base.frontiers, other.frontiers, flops)) if base.replicates else None
        if all(math.isfinite(each) and each > 0 for each in (times, *(ends or ()))):
            yield {"flops": flops, "multiplier": times, "interval": ends}


def _shared_exponents(kinds: Sequence[KindFit]) -> dict[str, Any] | None:
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
    except NoLaw:
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


def _approach2(kind: KindFit) -> dict[str, Any] | None:
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


def _rollout(kind: KindFit, replicates: int) -> Iterator[dict[str, Any]]:
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


def _finite(value: Any) -> Any:
    """For JSON: Python's own numbers, None for what is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
