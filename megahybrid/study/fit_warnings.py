"""What a fit is made of, and what speaks against it, in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from megahybrid.study.kind_fit import KindFit
from megahybrid.study.law.fit import EXPONENTS
from megahybrid.study.law.form import Misfit, influence, misfits
from megahybrid.study.law.law import BARELY
from megahybrid.study.table import Run

_NAMED = 5  # runs, of more only the number


def rule(runs: Sequence[Run]) -> str:
    """Which runs are fitted, and why the others are not."""
    fitted = sum(run.fitted for run in runs)
    reasons = Counter(_why(run) for run in runs if not run.fitted)
    left = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    second = "".join(f" {cell} is {first} again at half the rate." for first, cell in _second_tries(runs).items())
    return f"{fitted} of {len(runs)} runs are fitted; left out: {left or 'none'}.{second}"


def _why(run: Run) -> str:
    return run.state if run.state != "done" else run.excluded or "held out"


def _second_tries(runs: Sequence[Run]) -> dict[str, str]:
    """By the names of runs that diverged, those of the runs that are fitted in their place."""
    names = {run.run: run.cell for run in runs}
    return {names.get(run.retry_of, run.retry_of): run.cell for run in runs if run.fitted and run.retry_of}


def warnings(runs: Sequence[Run], kinds: Sequence[KindFit], noise: float) -> Iterator[str]:
    """Runs that are missing, and what makes a law doubtful.

    Args:
        runs, kinds: the table, and the kinds that were fitted to it.
        noise: standard deviation that a run's loss is expected to have, relative.
    """
    second = _second_tries(runs)
    lacking = [run.cell for run in runs if run.state != "done" and not run.held_out and run.cell not in second]
    if lacking:
        more = f" and {len(lacking) - _NAMED} more runs" if len(lacking) > _NAMED else ""
        verb = "has" if len(lacking) == 1 else "have"
        yield f"The fit lacks {', '.join(lacking[:_NAMED])}{more}, which {verb} no loss."
    for kind in kinds:
        yield from _doubts(kind)
    for each in misfits([kind.fit for kind in kinds], noise):
        yield _misfit(each, kinds[each.kind].name, noise)


def _doubts(kind: KindFit) -> Iterator[str]:
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


def _misfit(found: Misfit, kind: str, noise: float) -> str:
    how = {
        "repeats": "miss the law by more than seeds differ",
        "others": "miss the law by far more than those of the other kinds do",
        "noise": f"miss the law by far more than the noise of {100 * noise:.2g} % that is expected",
        "bend": f"bend away from the law's form with {found.along}",
    }[found.test]
    size = f"{100 * found.size:.2g} % (root mean square), p = {found.chance:.1g}"
    return f"The losses of {kind} {how}: {size}; intervals beyond its runs are too narrow."
