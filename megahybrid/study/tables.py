"""The tables of a study's report."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import variance
from typing import Any

from megahybrid.readable import short
from megahybrid.study import hours
from megahybrid.study.answers import baseline_range, covered, error, half_width, in_hours, listed, savings, why
from megahybrid.study.drawing import power
from megahybrid.study.results import Results

_FIGURES = {"a_opt": ".3f", "E": ".3f", "A": ".4g", "B": ".4g", "alpha": ".3f", "beta": ".3f"}


def tables(results: Results) -> Iterator[str]:
    """Headings, tables and what has to be said of them, as far as there is something in them."""
    for part in (_equal_loss, _frozen, _targets, _seeds, _fits, _checks, _left_out):
        yield from part(results)


def _equal_loss(results: Results) -> Iterator[str]:
    (low, high), rows = baseline_range(results), []
    for flops in (low, high, max(run.flops for run in results.runs)):
        for saving in savings(results, flops):
            where = power(flops) + ("" if flops <= high else ", beyond the fitted runs")
            time = str(in_hours(results, saving) or "not measured")
            rows.append([saving.kind, saving.base, where, str(saving), time])
    if not rows:
        return
    yield "## Cost of the same loss"
    yield "What a kind needs for the loss of another, as a multiple of what that one needs, with 95 % intervals."
    yield _table(["kind", "for the loss of", "at its FLOPs", "times the FLOPs", "times the GPU hours"], rows)
    said = {kind: speed for kind in results.kinds if (speed := hours.speeds(results, kind))}
    if said:
        rates = listed([f"{low / 1e12:.3g} to {high / 1e12:.3g} ({kind})" for kind, (low, high) in said.items()])
        yield (
            f"GPU hours are as the fitted runs took them, several at once each its part, at {rates} TFLOP/s a GPU: far "
            "below what a GPU can do they are the host's. Their ratio counts as exact, beyond the fitted sizes as that "
            "of the largest."
        )


def _frozen(results: Results) -> Iterator[str]:
    rows = []
    for run in results.runs:
        if run.cell not in results.frozen:
            continue
        frozen = results.frozen[run.cell]
        low, high = frozen["interval"]
        wide = f"{100 * half_width(results, run):.2g} %"
        row = [run.cell, power(run.flops), frozen["frozen"], run.began]
        row += [f"{frozen['loss']:.4f}", _interval((low, high), ".4f"), wide]
        if run.counts:
            row += [f"{run.loss:.4f}", f"{100 * error(results, run):+.2f} %", _yes(covered(results, run))]
        rows.append(row + [why(run), "", ""] * (not run.counts))
    if rows:
        yield "## Frozen predictions"
        yield "The error is positive where the loss came higher than predicted."
        head = [
            "run",
            "FLOPs",
            "written",
            "the run began",
            "predicted",
            "95 % interval",
            "±",
            "actual",
            "error",
            "inside",
        ]
        yield _table(head, rows)


def _targets(results: Results) -> Iterator[str]:
    rows = []
    for kind in results.kinds:
        for each in results.fit["kinds"][kind]["predictions"]:
            if not each["cell"]:
                size = [short(each[name]) for name in ("parameters", "tokens")]
                rows.append(
                    [kind, *size, power(each["flops"]), f"{each['loss']:.4f}", _interval(each["interval"], ".4f")]
                )
    if rows:
        yield "## Targets"
        yield _table(["kind", "parameters", "tokens", "FLOPs", "loss", "95 % interval"], rows)


def _seeds(results: Results) -> Iterator[str]:
    """How much runs differ that should not."""
    losses: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    for run in results.runs:
        if run.fitted:
            losses[run.kind, run.size, run.budget].append(math.log(run.loss))
    spread: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
    for (kind, size, _), alike in losses.items():
        if len(alike) > 1:
            spread[kind, size].append((variance(alike), len(alike) - 1))
    sizes = list(dict.fromkeys(size for _, size in spread))
    rows = []
    for kind in results.kinds:
        parts = [spread[kind, size] for size in sizes]
        sums = [(sum(each * freedom for each, freedom in part), sum(freedom for _, freedom in part)) for part in parts]
        rows.append(
            [kind, *(f"{100 * math.sqrt(total / freedom):.2g} %" if freedom else "" for total, freedom in sums)]
        )
    if sizes:
        yield "## Noise"
        yield "Standard deviation of the losses of runs that differ in their seed alone, over all budgets of a size."
        yield _table(["kind", *sizes], rows)


def _fits(results: Results) -> Iterator[str]:
    rows, fit = [], results.fit
    for kind in results.kinds:
        law = fit["kinds"][kind]
        rows.append([kind, *_law(law)])
        if law["without_embedding"]:
            rows.append([f"{kind}, N without embeddings", *_law(law["without_embedding"])])
    yield "## Fits"
    yield (
        "L = E + A/N^alpha + B/D^beta, with 95 % intervals. Compare a_opt and losses between studies: E, alpha and "
        "beta move with noise and with what is counted as a parameter."
    )
    yield _table(["kind", "runs", *_FIGURES, "objective", "gradient", "condition"], rows)
    if shared := fit["shared_exponents"]:
        yield (
            f"With exponents that all kinds share: alpha {shared['alpha']:.3f}, beta {shared['beta']:.3f}, objective "
            f"{shared['objective']:.3g} instead of {shared['objective_of_own_exponents']:.3g} together."
        )


def _law(law: Mapping[str, Any]) -> list[str]:
    values = [f"{law[name]:{how}} ({_interval(law['intervals'][name], how)})" for name, how in _FIGURES.items()]
    return [str(law["runs"]), *values, *(power(law[name]) for name in ("objective", "gradient_norm", "condition"))]


def _checks(results: Results) -> Iterator[str]:
    """What other ways to fit say."""
    deltas = list(next(iter(results.fit["kinds"].values()))["delta"])
    rows = []
    for kind in results.kinds:
        law, other = results.fit["kinds"][kind], results.fit["approach2"][kind]
        others = [f"{each['a_opt']:.3f}" if (each := law["delta"][delta]) else "none" for delta in deltas]
        steps = results.fit["rollout"][kind]
        last = _step(steps[-1]) if steps else "too few runs"
        rows.append([kind, f"{law['a_opt']:.3f}", *others, f"{other['a_opt']:.3f}" if other else "too few sizes", last])
    yield "## Cross-checks"
    yield (
        "a_opt with other widths of Huber's loss, and by approach 2; and how much higher the largest fitted budget "
        "came than a law says that is fitted to the smaller ones, on average."
    )
    yield _table(["kind", "a_opt", *(f"delta {each}" for each in deltas), "approach 2", "largest budget"], rows)


def _step(step: Mapping[str, Any]) -> str:
    inside = f"{step['covered']} of {step['predicted']} inside"
    return f"{100 * step['error']:+.2f} %, {inside}, from {step['fitted']} runs"


def _left_out(results: Results) -> Iterator[str]:
    rows = [
        [run.cell, run.run, run.state, why(run), f"{run.loss:.4f}" if run.loss == run.loss else "", run.retry_of]
        for run in results.runs
        if not run.counts
    ]
    if rows:
        yield "## Left out"
        yield _table(["run", "folder", "state", "why", "loss", "retry of"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _interval(ends: Sequence[float], how: str) -> str:
    return f"{ends[0]:{how}} to {ends[1]:{how}}"


def _yes(true: bool) -> str:
    return "yes" if true else "no"
