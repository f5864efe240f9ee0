"""What is drawn through a study's runs: the law, and parabolas over one logarithm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megahybrid.study.law.law import Law
from megahybrid.study.results import Run

EQUAL = 1.02  # FLOPs that differ by no more than this factor are the same


def law_loss(law: Mapping[str, Any], parameters: Any, tokens: Any) -> Any:
    """Nats a token of the parametric law of a kind in fit.json."""
    return Law(*(law[name] for name in ("A", "B", "E", "alpha", "beta"))).loss(parameters, tokens)


def parabola(runs: Sequence[Run]) -> tuple[np.ndarray | None, float | None]:
    """Coefficients of the loss over the log of the parameters at one budget, highest power first, and the parameters
    where it is lowest: the curve is None where runs are not at equal FLOPs or have fewer than three sizes, the lowest
    point where it is not between the sizes."""
    flops = [run.flops for run in runs]
    if len({run.parameters for run in runs}) < 3 or max(flops) > EQUAL * min(flops):
        return None, None
    return lowest_point([run.parameters for run in runs], [run.loss for run in runs])


def lowest_point(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, float | None]:
    """A parabola of y over log x, and the x of its lowest point, if that is between the smallest and the largest."""
    curve = np.polyfit(np.log(x), y, 2)
    lowest = float(np.exp(-curve[1] / (2 * curve[0]))) if curve[0] > 0 else 0.0
    return curve, lowest if min(x) <= lowest <= max(x) else None


def tunings(runs: Sequence[Run]) -> list[list[Run]]:
    """Finished runs of one kind, size and budget in a tuning grid, by rate, where there are at least three."""
    groups: dict[tuple[str, str, float], list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.learning_rate):
        if run.role == "tune" and run.state == "done":
            groups.setdefault((run.kind, run.size, run.budget), []).append(run)
    return [group for group in groups.values() if len(group) >= 3]
