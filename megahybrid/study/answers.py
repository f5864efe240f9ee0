"""What a study says, in sentences that follow from its figures, and what it cannot say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from megahybrid.study import hours
from megahybrid.study.drawing import power
from megahybrid.study.law.approach2 import SAME_COMPUTE
from megahybrid.study.results import Results
from megahybrid.study.table import Run

_ROUNDING = 1 + 1e-9
_NAMED = 6  # runs that a sentence names; of more it gives the number, and the table has the names


class Saving(NamedTuple):
    """What a kind needs for the loss of another, as a multiple of that one's own cost."""

    base: str  # the other
    kind: str
    flops: float  # of the other
    times: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the 95 % interval leaves 1 out."""
        return not self.low <= 1 <= self.high

    def __str__(self) -> str:
        return f"{self.times:.3g} ({self.low:.3g} to {self.high:.3g})"


def baseline_range(results: Results) -> tuple[float, float]:
    """FLOPs between which every kind has fitted runs."""
    flops = [[run.flops for run in results.of(kind) if run.fitted] for kind in results.kinds]
    return max(map(min, flops)), min(map(max, flops))


def savings(results: Results, flops: float) -> list[Saving]:
    """Of every kind against each before it, the baseline first, at some FLOPs of that one, between fit.json's points in
    proportion to logarithms; without kinds that may never have that loss."""
    found = []
    for pair, points in results.fit["multipliers"].items():
        base, kind = pair.split(" vs ")
        known = [each["flops"] for each in points]
        if known and min(known) <= flops * _ROUNDING and flops <= max(known) * _ROUNDING:
            rows = np.log([[each["flops"], each["multiplier"], *each["interval"]] for each in points])
            times = [float(np.exp(np.interp(np.log(flops), rows[:, 0], column))) for column in rows.T[1:]]
            found.append(Saving(base, kind, flops, *times))
    return found


def in_hours(results: Results, saving: Saving) -> Saving | None:
    """The same of GPU hours as measured; None where none were."""
    ratio = hours.ratio(results, saving.base, saving.kind, saving.flops, saving.times)
    if not math.isfinite(ratio):
        return None
    return saving._replace(times=saving.times * ratio, low=saving.low * ratio, high=saving.high * ratio)


def answers(results: Results) -> list[str]:
    """What it says."""
    parts = _other_runs, _savings, _forecasts, _side_by_side, _sizes, _approach2, _runs, _retries, _warnings
    return [sentence for part in parts for sentence in part(results)]


def _other_runs(results: Results) -> Iterator[str]:
    for kind in results.kinds:
        fitted, now = results.fit["kinds"][kind]["runs"], sum(run.fitted for run in results.of(kind))
        if fitted != now:
            yield f"**The fit of {kind} has {fitted} runs, runs.csv {now}**: run `megahybrid study fit` again."


def _savings(results: Results) -> Iterator[str]:
    for saving in savings(results, baseline_range(results)[1]):
        base, kind, time = saving.base, saving.kind, in_hours(results, saving)
        said = f"{kind} and {base} cannot be told apart"
        if saving.clear:
            difference = f"{100 * abs(1 - saving.times):.0f} % {'less' if saving.times < 1 else 'more'}"
            said = f"{kind} needs {difference} compute than {base} for the same loss"
        ends = f"95 % interval {saving.low:.3g} to {saving.high:.3g}"
        place = (
            f"at {power(saving.flops)} FLOPs of {base}, where fitted runs end, each at the size that its law calls best"
        )
        yield (
            f"**{said}**: {saving.times:.3g} times the FLOPs ({ends}), {place}."
            + (f" As these runs used GPUs, {time} times the hours." if time else "")
        )


def _forecasts(results: Results) -> Iterator[str]:
    frozen = [run for run in results.runs if run.cell in results.frozen]
    came = [run for run in frozen if run.counts and predicted_before(results, run)]
    if came:
        right, wide = sum(covered(results, run) for run in came), sorted(half_width(results, run) for run in came)
        half = " to ".join(_once(f"{100 * each:.2g}" for each in (wide[0], wide[-1])))
        inside = f"the loss came inside the 95 % interval, ± {half} %"
        yield f"**{right} of {len(came)} frozen predictions were right**: {inside}."
    for run in frozen:
        prediction = results.frozen[run.cell]
        low, high = prediction["interval"]
        ratio = _beyond(results, run)
        said = f"{run.kind}, {ratio:.3g} times the FLOPs of its largest fitted run: {prediction['loss']:.4f} "
        said += f"({low:.4f} to {high:.4f}) nats a token were predicted"
        if not run.counts:
            yield f"{said}; the run is not done ({why(run)})."
            continue
        place = "inside the interval" if covered(results, run) else "outside the interval"
        place = "which nothing was said of" if (low, high) == (-math.inf, math.inf) else place
        late = "" if predicted_before(results, run) else " The run had begun when that was written."
        yield f"{said}, {run.loss:.4f} came: {100 * error(results, run):+.2f} %, {place}.{late}"


def _beyond(results: Results, run: Run) -> float:
    """FLOPs of a held-out run by those of its kind's largest fitted one."""
    return run.flops / max(each.flops for each in results.of(run.kind) if each.fitted)


def predicted_before(results: Results, run: Run) -> bool:
    """Whether a held-out run, which another study may have trained, had not begun when its prediction was written."""
    return not run.began or results.frozen[run.cell]["frozen"] <= run.began


def error(results: Results, run: Run) -> float:
    """Of a held-out run: how much higher than its frozen prediction it came, relative to that."""
    return run.loss / results.frozen[run.cell]["loss"] - 1


def covered(results: Results, run: Run) -> bool:
    """Whether a held-out run came to lie in the interval that was frozen; one that is open to both sides holds none."""
    low, high = results.frozen[run.cell]["interval"]
    return low <= run.loss <= high and (low, high) != (-math.inf, math.inf)


def half_width(results: Results, run: Run) -> float:
    """Of the interval that was frozen of a held-out run, half, relative to what was predicted."""
    low, high = results.frozen[run.cell]["interval"]
    return (high - low) / 2 / results.frozen[run.cell]["loss"]


def _side_by_side(results: Results) -> Iterator[str]:
    """Held-out runs of as many FLOPs as the baseline's: what came, beside what laws said."""
    frozen = [run for run in results.runs if run.cell in results.frozen and run.counts]
    for first in (run for run in frozen if run.kind == results.kinds[0]):
        others = [run for run in frozen if run.kind != first.kind and _alike(run, first)]
        said = []
        for run in others:
            came = 100 * (run.loss / first.loss - 1)
            foretold = 100 * (results.frozen[run.cell]["loss"] / results.frozen[first.cell]["loss"] - 1)
            said.append(f"{run.kind} at {run.loss:.4f} ({came:+.1f} %, by the predictions {foretold:+.1f} %)")
        if said:
            yield f"At {power(first.flops)} FLOPs, one run each, {first.kind} came at {first.loss:.4f}, {listed(said)}."


def _alike(one: Run, other: Run) -> bool:
    return (one.budget, one.seed) == (other.budget, other.seed) and abs(one.flops / other.flops - 1) < 0.01


def _sizes(results: Results) -> Iterator[str]:
    said = []
    for kind in results.kinds:
        law = results.fit["kinds"][kind]
        low, high = law["intervals"]["a_opt"]
        said.append(f"{law['a_opt']:.3f} ({low:.3f} to {high:.3f}) of {kind}")
    yield f"With compute C the best number of parameters grows as C to the power of {listed(said)}."


def _approach2(results: Results) -> Iterator[str]:
    found = {kind: check for kind, check in results.fit["approach2"].items() if check and check["bias"]}
    if found:
        slopes = listed([f"{check['a_opt']:.3f} for {kind}" for kind, check in found.items()])
        biases = listed([f"{100 * check['bias']['tokens']:+.1f} %" for check in found.values()])
        flops = listed(_once(power(check["bias"]["flops"]) for check in found.values()))
        yield (
            f"Approach 2 gives {slopes}. It is biased: from the law's own losses, at these runs, it gets the best "
            f"number of tokens at {flops} FLOPs {biases} off."
        )


def _runs(results: Results) -> Iterator[str]:
    fitted = sum(run.fitted for run in results.runs)
    held = sum(run.counts and run.held_out for run in results.runs)
    reasons: dict[str, list[str]] = {}
    for run in results.runs:
        if not run.counts:
            tuning = "of the tuning grid" if run.role == "tune" else f"({run.excluded})"
            reasons.setdefault(tuning if run.state == "done" else run.state, []).append(run.cell)
    parts = [f"{fitted} fitted", f"{held} held out and done"]
    parts += [f"{len(cells)} {reason}{_names(cells)}" for reason, cells in reasons.items()]
    yield f"{len(results.runs)} runs: {listed(parts)}."


def _retries(results: Results) -> Iterator[str]:
    names = {run.run: run.cell for run in results.runs}
    for run in results.runs:
        if run.retry_of:
            place = "in its place" if run.counts else f"which is not done ({why(run)})"
            first = names.get(run.retry_of, run.retry_of)
            yield f"{run.cell} is {first} again at a learning rate of {power(run.learning_rate)}, {place}."


def why(run: Run) -> str:
    """Why the law was not fitted to a run."""
    return run.excluded or run.state


def _names(cells: Sequence[str]) -> str:
    return f" ({', '.join(cells)})" if len(cells) <= _NAMED else ""


def _warnings(results: Results) -> Iterator[str]:
    yield from (f"The fit warns: {warning}" for warning in results.fit["warnings"])


def open_questions(results: Results) -> list[str]:
    """What cannot be concluded."""
    return [*_ties(results), *_same_exponents(results), *_extrapolation(results), *_noise(results)]


def _ties(results: Results) -> Iterator[str]:
    flops = baseline_range(results)[1]
    found = savings(results, flops)
    for pair in results.fit["multipliers"]:
        base, kind = pair.split(" vs ")
        if (base, kind) not in [(saving.base, saving.kind) for saving in found]:
            yield f"What {kind} needs for the loss of {base} at {power(flops)} FLOPs: by its law it may never have it."
    for saving in found:
        if not saving.clear:
            yield f"Whether {saving.kind} or {saving.base} needs less compute: the interval, {saving}, holds 1."
        time = in_hours(results, saving)
        if time is not None and not time.clear:
            yield f"Whether {saving.kind} or {saving.base} needs fewer GPU hours: the interval, {time}, holds 1."


def _same_exponents(results: Results) -> Iterator[str]:
    ends = [results.fit["kinds"][kind]["intervals"]["a_opt"] for kind in results.kinds]
    if len(ends) > 1 and max(low for low, _ in ends) <= min(high for _, high in ends):
        yield "Whether the kinds' best sizes grow differently with compute: the intervals of the exponents overlap."


def _extrapolation(results: Results) -> Iterator[str]:
    frozen = [run for run in results.runs if run.cell in results.frozen and run.counts]
    frozen = [run for run in frozen if predicted_before(results, run)]
    beyond = _once(power(run.flops) for run in frozen if _beyond(results, run) > SAME_COMPUTE)
    checked = f"held-out runs test it at {listed(beyond)} only" if beyond else ""
    yield f"What holds beyond {power(results.end)} FLOPs, where no run was fitted: {checked or 'no run has tested it'}."
    for kind in results.kinds:
        if not any(run.kind == kind for run in frozen):
            yield f"Whether the law of {kind} predicts: no held-out run that was predicted before it began is done."
        elif not all(covered(results, run) for run in frozen if run.kind == kind):
            yield f"How far to trust the intervals of {kind} beyond its fitted runs: its own held-out run fell outside."


def _noise(results: Results) -> Iterator[str]:
    cells = [(run.kind, run.size, run.budget) for run in results.runs if run.fitted]
    if len(set(cells)) == len(cells):
        yield "How much two seeds differ: no run was repeated."


def _once(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def listed(texts: Sequence[str]) -> str:
    """a, b and c."""
    *most, last = texts
    return f"{', '.join(most)} and {last}" if most else last
