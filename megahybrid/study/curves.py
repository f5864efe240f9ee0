"""Which of a study's runs belong on one curve."""

from __future__ import annotations

from collections.abc import Sequence

from megahybrid.study.law.approach2 import SAME_COMPUTE, Parabola
from megahybrid.study.table import Run


def parabola(runs: Sequence[Run]) -> Parabola | None:
    """Of the loss over the parameters at one budget; None where runs are not at equal FLOPs, or have fewer than three
    sizes."""
    flops = [run.flops for run in runs]
    if len({run.parameters for run in runs}) < 3 or max(flops) > SAME_COMPUTE * min(flops):
        return None
    return Parabola.through([run.parameters for run in runs], [run.loss for run in runs])


def tunings(runs: Sequence[Run]) -> list[list[Run]]:
    """Finished runs of one kind, size and budget in a tuning grid, by rate, where there are at least three."""
    groups: dict[tuple[str, str, float], list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.learning_rate):
        if run.role == "tune" and run.state == "done":
            groups.setdefault((run.kind, run.size, run.budget), []).append(run)
    return [group for group in groups.values() if len(group) >= 3]
