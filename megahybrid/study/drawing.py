"""What all pictures of a study share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from megahybrid.study.cells import budget_name
from megahybrid.study.results import Results
from megahybrid.study.table import Run
from megahybrid.training.drawing import ACCENT, INK, tidy

LOSS = "loss (nats a token)"
STAR = Line2D([], [], color="grey", marker="*", linestyle="", markersize=10, label="held out")
BEYOND = Line2D([], [], color="grey", linestyle="--", label="beyond the fitted runs")

_COLORS = INK, ACCENT, "#3d8361", "#7d5ba6", "#c9962b", "#4d9db4"
_MARKERS = "osD^vP"
_COLUMNS = 3  # panels side by side
_TICKS = 6  # on a log axis, at most


def styles(results: Results) -> dict[str, dict[str, Any]]:
    """Each kind's colour and marker."""
    return {
        kind: {"color": _COLORS[place % len(_COLORS)], "marker": _MARKERS[place % len(_MARKERS)]}
        for place, kind in enumerate(results.kinds)
    }


def panels(titles: Sequence[str], sharey: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure with a panel a title, three in a row."""
    columns = min(_COLUMNS, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(max(1 + 3.6 * columns, 5.5), 0.5 + 3.6 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=sharey, squeeze=False).flat)
    for axes in grid[len(titles) :]:
        axes.set_visible(False)
    for axes, title in zip(grid, titles, strict=False):
        axes.set_title(title, fontsize=10)
    return figure, grid[: len(titles)]


def finish(grid: Sequence[Axes], label: str, text: Callable[[float, int], str]) -> None:
    """What all panels have along x and y, after everything is drawn; said once a column, and once."""
    for place, axes in enumerate(grid):
        lowest = place + _COLUMNS >= len(grid)
        log_axis(axes, "x", label if lowest else "", text)
        axes.tick_params(labelbottom=lowest)
    grid[0].set_ylabel(LOSS)


def legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """One for the whole figure, below it."""
    longest = max(len(each.get_label()) for each in handles)
    columns = int(figure.get_figwidth() // (0.65 + 0.075 * longest))  # inches
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), columns), frameon=False, fontsize=9
    )


def kinds_legend(figure: Figure, results: Results, *more: Line2D, line: bool = False) -> None:
    """The kinds' colours with a line or with their markers, and what else there is to be told."""
    shapes = [
        {**style, "linestyle": ""} if not line else {"color": style["color"]} for style in styles(results).values()
    ]
    kinds = [Line2D([], [], label=kind, **shape) for kind, shape in zip(results.kinds, shapes, strict=True)]
    legend(figure, [*kinds, *more])


def dots(axes: Axes, x: Any, y: Any, style: Mapping[str, Any]) -> None:
    """Fitted runs."""
    axes.plot(x, y, linestyle="", markersize=4.5, alpha=0.75, **style)


def star(axes: Axes, x: float, y: float, style: Mapping[str, Any]) -> None:
    """A held-out run."""
    axes.plot(x, y, "*", color=style["color"], markersize=13, markeredgecolor="white", zorder=3)


def log_axis(axes: Axes, which: str, label: str, text: Callable[[float, int], str]) -> None:
    """A log axis, x or y, with a few round numbers on it; after everything is drawn."""
    axes.set(**{f"{which}scale": "log", f"{which}label": label})
    axis: Axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(FixedLocator(round_numbers(*axis.get_view_interval())))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(text))
    tidy(axes)


def round_numbers(low: float, high: float) -> list[float]:
    """As many round numbers from `low` to `high` as fit on an axis."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for mantissas in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**decade for decade in decades for m in mantissas if low <= m * 10.0**decade <= high]
        if len(ticks) <= _TICKS:
            return ticks
    return ticks[:: -(-len(ticks) // _TICKS)]


def power(value: float, _: int = 0) -> str:
    """3e18 for 3,000,000,000,000,000,000."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def budget_label(run: Run) -> str:
    """A run's budget with its unit, which is that in which the run has about as many."""
    has = {"FLOPs": run.flops, "tokens": run.tokens, "tokens a parameter": run.tokens / run.parameters}
    return f"{budget_name(run.budget)} {min(has, key=lambda unit: abs(np.log(has[unit] / run.budget)))}"
