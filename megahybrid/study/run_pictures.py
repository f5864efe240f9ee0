"""Pictures of a study that need no fit: learning rates, branches, cost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megahybrid.study import hours
from megahybrid.study.curves import tunings
from megahybrid.study.drawing import budget_label, finish, legend, panels, power
from megahybrid.study.law.approach2 import Parabola
from megahybrid.study.law.law import Law
from megahybrid.study.results import Results
from megahybrid.study.table import Run
from megahybrid.training.drawing import ACCENT, INK, short_number, tidy


def learning_rate_figure(results: Results) -> Figure | None:
    """Loss over the learning rate in tuning grids, a panel a kind and a parabola a grid, with its lowest point; None
    where nothing was tried at three rates."""
    groups = tunings(results.runs)
    kinds = list(dict.fromkeys(group[0].kind for group in groups))
    if not kinds:
        return None
    figure, grid = panels(kinds, sharey=False)
    for axes, kind in zip(grid, kinds, strict=True):
        chosen = [group for group in groups if group[0].kind == kind]
        for group, color in zip(chosen, colormaps["viridis"](np.linspace(0, 0.85, len(chosen))), strict=True):
            _tuning(axes, group, color)
        axes.margins(y=0.15)
        axes.legend(frameon=False, fontsize=8, loc="upper center")
    finish(grid, "learning rate", power)
    return figure


def _tuning(axes: Axes, group: Sequence[Run], color: Any) -> None:
    rates = [run.learning_rate for run in group]
    curve = Parabola.through(rates, [run.loss for run in group])
    line = np.geomspace(rates[0], rates[-1], 60)
    found = "lowest at the edge" if curve.lowest is None else f"lowest at {power(curve.lowest)}"
    label = f"{group[0].size}, {budget_label(group[0])}: {found}"
    axes.plot(line, curve(line), color=color, linewidth=1.5, label=label)
    if curve.lowest is not None:
        axes.plot(curve.lowest, curve(curve.lowest), "*", color=ACCENT, markersize=11, zorder=3)
    axes.plot(rates, [run.loss for run in group], "o", color=color, markersize=5)


def branches_figure(results: Results) -> Figure | None:
    """Final loss over tokens of trunks (squares) and their branches, a panel a kind and a colour a size, with the law's
    lines; None where nothing branches."""
    branched = {run.trunk for run in results.runs if run.role == "branch"}
    kinds = [kind for kind in results.kinds if any(run.trunk in branched for run in results.of(kind))]
    if not kinds:
        return None
    families: dict[tuple[str, str], list[Run]] = {}
    for run in itertools.chain.from_iterable(map(results.of, kinds)):
        if run.trunk in branched:
            families.setdefault((run.kind, run.size), []).append(run)
    sizes = list(dict.fromkeys(size for _, size in families))
    colors = dict(zip(sizes, colormaps["viridis"](np.linspace(0, 0.85, len(sizes))), strict=True))
    figure, grid = panels(kinds)
    for axes, kind in zip(grid, kinds, strict=True):
        for size, color in colors.items():
            if runs := families.get((kind, size)):
                _branches(axes, runs, results.law(kind), color)
    finish(grid, "tokens", short_number)
    legend(figure, [Line2D([], [], color=color, marker="o", label=size) for size, color in colors.items()])
    return figure


def _branches(axes: Axes, runs: Sequence[Run], law: Law, color: Any) -> None:
    tokens = [run.tokens for run in runs]
    line = np.geomspace(min(tokens), max(tokens), 60)
    axes.plot(line, law.loss(runs[0].parameters, line), color=color, linestyle="--", linewidth=1)
    for role, marker, size in (("branch", "o", 4.5), ("trunk", "s", 7)):
        chosen = [run for run in runs if run.role == role]
        x, y = [run.tokens for run in chosen], [run.loss for run in chosen]
        axes.plot(x, y, marker, color=color, markersize=size, alpha=0.7)


def cost_figure(results: Results) -> Figure | None:
    """GPU hours of each kind and size, as planned, and as used for runs that the law was fitted to, held-out ones and
    others; None where neither is known."""
    planned, by_use = hours.planned(results), hours.by_use(results.runs)
    if not any(sum(each.values()) for each in (planned, *by_use.values())):
        return None
    order = list(dict.fromkeys(run.kind for run in results.runs))
    by_size = sorted(results.runs, key=lambda run: (order.index(run.kind), run.parameters))
    rows = list(dict.fromkeys((run.kind, run.size) for run in by_size))
    figure = Figure(figsize=(8, 1.6 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    left, places = np.zeros(len(rows)), np.arange(len(rows))
    if planned:
        width = [planned.get(row, 0.0) for row in rows]
        label = f"planned, one after another: {sum(width):.3g} h"
        axes.barh(places - 0.19, width, 0.3, color="white", edgecolor="black", linewidth=0.9, label=label)
    for (name, used), color in zip(by_use.items(), (INK, ACCENT, "#9a9a9a"), strict=True):
        width = np.array([used.get(row, 0.0) for row in rows])
        axes.barh(places + 0.16, width, 0.34, left=left, color=color, label=f"used, {name}: {width.sum():.3g} h")
        left += width
    axes.set_yticks(places, [f"{kind} {size}" for kind, size in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.03 * axes.dataLim.x1)
    axes.set_xlabel("GPU hours")
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
