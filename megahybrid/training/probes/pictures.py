"""The picture of what a run's probes found."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from megahybrid.training.drawing import ACCENT, GRID, INK, over_tokens, short_number, tidy
from megahybrid.training.probes import names
from megahybrid.training.run_directory import Metrics

COLUMNS = 3
MOST_CURVES = 40  # of loss by position
HITS = ("bigram at most w ago", "at most 4w ago", "longer ago")

Panel = Callable[[Axes], None]


def probes_figure(metrics: Metrics) -> Figure:
    """Loss by position, gain beyond the window, loss of repeated bigrams, and for each task its answers inside the
    window and beyond it, beside the recency null, and what the heads held of the latter; as far as probed.

    At least one line must have been probed.
    """
    lines = [line for line in metrics if names.SECONDS in line]
    panels = list(_panels(lines))
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.7 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, panel in zip(grid, panels, strict=False):
        panel(axes)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure


def _panels(lines: Metrics):
    found = {key for line in lines for key in line}
    if names.POSITION in found:
        yield partial(_position, lines)
    if names.GAIN in found:
        yield partial(_gain, lines)
    if names.HITS in found:
        yield partial(_hits, lines)
    for task in sorted(key.removeprefix(names.NLL) for key in found if key.startswith(names.NLL)):
        yield partial(_recall, lines, task)
    for task in sorted(key.removeprefix(names.KEPT) for key in found if key.startswith(names.KEPT)):
        yield partial(_kept, lines, task)


def series(lines: Metrics, key: str, element: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and values of the lines that have the key, NaN where there is nothing to tell."""
    having = [line for line in lines if key in line]
    values = [line[key] if element is None else line[key][element] for line in having]
    return np.array([line["tokens"] for line in having], float), np.array(values, float)


def _plot(axes: Axes, lines: Metrics, key: str, element: int | None = None, **style: Any) -> None:
    axes.plot(*series(lines, key, element), **{"marker": "o", "markersize": 3, "linewidth": 1.3, **style})


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(label)
    axes.set_xlabel("tokens")
    over_tokens(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _position(lines: Metrics, axes: Axes) -> None:
    lines = [line for line in lines if names.POSITION in line]
    lines = lines[:: -max(1, -(-len(lines) // MOST_CURVES))][::-1]
    scale = Normalize(0, lines[-1]["tokens"])
    colors = colormaps["viridis"]
    for line in lines:
        losses = np.array(line[names.POSITION], float)
        first = np.array(names.first_positions(len(losses))) + 0.5  # the first bin is position 0
        axes.plot(first, losses, color=colors(scale(line["tokens"])), linewidth=1.1, marker="o", markersize=2)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(np.floor(value), 0)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title("loss by position", fontsize=10)
    axes.set_xlabel("position in the document, up to its double")
    axes.set_ylabel("nats a token")
    tidy(axes)
    bar = axes.figure.colorbar(ScalarMappable(scale, colors), ax=axes, label="tokens")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(short_number))


def _gain(lines: Metrics, axes: Axes) -> None:
    _plot(axes, lines, names.GAIN, color=INK)
    axes.axhline(0, color=ACCENT, linestyle="--", linewidth=1)
    _finish(axes, "gain beyond the window", "nats a token")


def _hits(lines: Metrics, axes: Axes) -> None:
    for number, (label, color) in enumerate(zip(HITS, colormaps["viridis"]((0.1, 0.5, 0.85)), strict=True)):
        _plot(axes, lines, names.HITS, number, color=color, label=label)
    _plot(axes, lines, names.OTHERS, color=GRID, label="all others")
    _finish(axes, "loss of repeated bigrams", "nats a token")


def _recall(lines: Metrics, task: str, axes: Axes) -> None:
    for number, (label, color) in enumerate((("inside the window", INK), ("beyond it", ACCENT))):
        _plot(axes, lines, names.ACCURACY + task, number, color=color, label=label)
    tokens, null = series(lines, names.NULL + task)
    parts = [np.nan_to_num(series(lines, names.ACCURACY + task, number)[1]) for number in (0, 1)]
    axes.plot(tokens, null * parts[0] + (1 - null) * parts[1], color="black", linewidth=0.9, linestyle=":", label="all")
    axes.axhline(null[-1], color="gray", linestyle="--", linewidth=1, label=f"recency null of all, {null[-1]:.2f}")
    axes.set_ylim(-0.03, 1.03)
    _finish(axes, task, "share of answers that are right")


def _kept(lines: Metrics, task: str, axes: Axes) -> None:
    _plot(axes, lines, names.KEPT + task, color=INK, label="layers' heads that hold a needle")
    _plot(axes, lines, names.SOMEWHERE + task, color=INK, linestyle=":", label="needles that any head holds")
    for number, (label, style) in enumerate((("right if none does", ":"), ("right if one does", "-"))):
        _plot(axes, lines, names.GIVEN + task, number, color=ACCENT, linestyle=style, label=label)
    axes.set_ylim(-0.03, 1.03)
    _finish(axes, f"{task}, beyond the window", "share")
