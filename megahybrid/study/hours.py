"""GPU hours of a study: as measured, and what equal losses cost in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from megahybrid.study.results import Results
from megahybrid.study.table import Run

Hours = dict[tuple[str, str], float]


def by_use(runs: Sequence[Run]) -> dict[str, Hours]:
    """GPU hours by kind and size of the runs that the law was fitted to, of the held-out ones, and of all others."""
    parts: dict[str, Hours] = {name: defaultdict(float) for name in ("fitted", "held out", "not fitted")}
    for run in runs:
        name = "fitted" if run.fitted else "held out" if run.held_out and run.counts else "not fitted"
        parts[name][run.kind, run.size] += np.nan_to_num(run.gpu_hours)
    return parts


def planned(results: Results) -> Hours:
    """GPU hours by kind and size that the plan expects; empty where there is no plan."""
    expected: Hours = defaultdict(float)
    for run in results.runs:
        if run.cell in results.planned:
            expected[run.kind, run.size] += results.planned[run.cell]
    return expected


def ratio(results: Results, base: str, kind: str, flops: float, multiplier: float) -> float:
    """Hours a FLOP of a kind at its best size for `flops · multiplier`, by those of the baseline at its own for
    `flops`, both as measured; what a compute multiplier is to be multiplied by for one of GPU hours."""
    return _rate(results, kind, flops * multiplier) / _rate(results, base, flops)


def _rate(results: Results, kind: str, flops: float) -> float:
    """Measured GPU hours a FLOP at the size that is best for some FLOPs: between measured sizes in proportion to the
    logarithm of the parameters, beyond them as at the nearest."""
    measured = _measured(results, kind)
    if not measured:
        return np.nan
    law = results.fit["kinds"][kind]
    point = law["optimum"][0]
    best = np.log(point["parameters"]) + law["a_opt"] * np.log(flops / point["flops"])
    return float(np.exp(np.interp(best, np.log(list(measured)), np.log(list(measured.values())))))


def speeds(results: Results, kind: str) -> tuple[float, float] | None:
    """FLOP/s a GPU of a kind's fitted runs, at the slowest size and at the fastest; None where nothing was measured."""
    rates = [1 / (3600 * each) for each in _measured(results, kind).values()]
    return (min(rates), max(rates)) if rates else None


def _measured(results: Results, kind: str) -> dict[float, float]:
    """Hours a FLOP by parameters, the fewest first, the median of fitted runs. Held-out ones, which train later, on
    other GPUs maybe and beside fewer, are left out, and branches, whose hours are a part's."""
    found: dict[float, list[float]] = defaultdict(list)
    for run in results.of(kind):
        if run.fitted and run.role != "branch" and run.gpu_hours > 0:
            found[run.parameters].append(run.gpu_hours / run.flops)
    return {size: float(np.median(found[size])) for size in sorted(found)}
