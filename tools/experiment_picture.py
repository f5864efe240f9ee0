"""An experiment's runs in one picture: a row a setting, a panel a quantity, a dot a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megahybrid.training.drawing import ACCENT, INK, tidy
from tools.experiment import Check, Experiment, Row


def draw(experiment: Experiment, rows: Sequence[Row], path: Path) -> None:
    """PNG of what is known; bounds that the checks name are lines, the arms that must pass are coloured."""
    rows = [row for row in rows if row["seed"] != experiment.choose_seed]
    known = [name for name in experiment.quantities if any(row[name] is not None for row in rows)]
    settings = [setting for setting in experiment.settings if any(row["setting"] == setting for row in rows)]
    if not known or not settings:
        return
    size = (1.6 + 2.6 * len(known), 0.6 + len(settings) * (0.8 + 0.28 * len(experiment.arms)))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(settings), len(known), squeeze=False, sharey=True, sharex="col")
    for line, setting in zip(grid, settings, strict=True):
        for axes, name in zip(line, known, strict=True):
            checks = [check for check in (*experiment.given, *experiment.passes) if check.quantity == name]
            _panel(axes, experiment, [row for row in rows if row["setting"] == setting], name, checks)
        if len(settings) > 1:
            line[0].set_ylabel(setting)
    for axes, name in zip(grid[0], known, strict=True):
        axes.set_title(name, fontsize=9)
    figure.savefig(path, dpi=120)


def _panel(axes: Axes, experiment: Experiment, rows: Sequence[Row], name: str, checks: Sequence[Check]) -> None:
    arms = list(experiment.arms)
    tested = {check.arm for check in experiment.passes if check.quantity == name}
    for place, arm in enumerate(arms):
        values = [row[name] for row in rows if row["arm"] == arm and row[name] is not None]
        color = ACCENT if arm in tested else INK
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.6, markersize=5, markeredgewidth=0)
    for check in checks:
        for bound in filter(None, (check.at_least, check.at_most)):
            place = arms.index(check.arm)
            axes.plot([bound] * 2, [place - 0.4, place + 0.4], color="grey", linewidth=1)
    axes.set_yticks(range(len(arms)), arms, fontsize=8)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    if not name.startswith("metric:"):
        axes.set_xlim(-0.03, 1.03)
    tidy(axes)
