"""What all pictures of a run share."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megahybrid.readable import short

INK, ACCENT, GRID = "#1f3a5f", "#c8553d", "#d9d9d9"


def tidy(axes: Axes) -> None:
    """A light grid, and nothing that distracts."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def over_tokens(axes: Axes) -> None:
    """Trained tokens along the horizontal axis."""
    tidy(axes)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(short_number))


def short_number(value: float, _: int) -> str:
    """A tick's text: 1.5M for 1,500,000."""
    return short(value)
