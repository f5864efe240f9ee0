"""An experiment's runs in one picture: a row a setting, a panel a quantity, a line an arm or policy, a dot a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megahybrid.training.drawing import ACCENT, INK, tidy
from tools.experiment import Experiment
from tools.experiment_checks import Check, Row


def draw(experiment: Experiment, rows: Sequence[Row], path: Path) -> None:
    """PNG of what is known; bounds that the checks name are marks, the arms that must pass are coloured."""
    rows = [row for row in rows if row["seed"] != experiment.choose_seed]
    known = [name for name in experiment.quantities if any(row[name] is not None for row in rows)]
    settings = [setting for setting in experiment.settings if any(row["setting"] == setting for row in rows)]
    panels: dict[str, list[str]] = {}
    for name in known:
        panels.setdefault(name if name.startswith("metric:") else name.partition(":")[0], []).append(name)
    if not panels or not settings:
        return
    lines = {title: _lines(experiment, rows, names) for title, names in panels.items()}
    size = (0.3 + 3.4 * len(panels), len(settings) * (0.7 + 0.24 * max(map(len, lines.values()))))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(settings), len(panels), squeeze=False, sharex="col")
    for row_of_panels, setting in zip(grid, settings, strict=True):
        here = [row for row in rows if row["setting"] == setting]
        for axes, title in zip(row_of_panels, panels, strict=True):
            _panel(axes, experiment, setting, here, lines[title])
        if len(settings) > 1:
            row_of_panels[0].set_ylabel(setting)
    for axes, title in zip(grid[0], panels, strict=True):
        axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=120)


def _lines(experiment: Experiment, rows: Sequence[Row], names: Sequence[str]) -> list[tuple[str, str]]:
    """(arm, quantity) of what any run knows, each arm's policies behind it."""
    there = {(row["arm"], name) for row in rows for name in names if row[name] is not None}
    return [(arm, name) for arm in experiment.arms for name in names if (arm, name) in there]


def _panel(
    axes: Axes, experiment: Experiment, setting: str, rows: Sequence[Row], lines: Sequence[tuple[str, str]]
) -> None:
    given, passes = ([x for x in checks if x.asked_in(setting)] for checks in (experiment.given, experiment.passes))
    for place, (arm, name) in enumerate(lines):
        values = [row[name] for row in rows if row["arm"] == arm and row[name] is not None]
        tested = any((check.arm, check.quantity) == (arm, name) for check in passes)
        color = ACCENT if tested else INK
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.6, markersize=5, markeredgewidth=0)
        for bound in _bounds((*given, *passes), arm, name):
            axes.plot([bound] * 2, [place - 0.4, place + 0.4], color="grey", linewidth=1)
    policies = [name.partition(":")[2] if not name.startswith("metric:") else "" for _, name in lines]
    labels = [f"  {policy} instead" if policy else arm for (arm, _), policy in zip(lines, policies, strict=True)]
    axes.set_yticks(range(len(lines)), labels, fontsize=8)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    if not any(name.startswith("metric:") for _, name in lines):
        axes.set_xlim(-0.03, 1.03)
    tidy(axes)


def _bounds(checks: Sequence[Check], arm: str, name: str) -> list[float]:
    here = [check for check in checks if (check.arm, check.quantity) == (arm, name)]
    return [bound for check in here for bound in (check.at_least, check.at_most) if bound is not None]
