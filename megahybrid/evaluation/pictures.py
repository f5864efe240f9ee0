"""Pictures of an evaluation: where in the context a needle is found, and what a context's length does and costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from megahybrid.evaluation.results import Entry, short
from megahybrid.training.drawing import ACCENT, GRID, INK, tidy

_COSTS = "state of a sequence, MiB", "decoding a token, ms"


def draw(folder: Path, results: Sequence[Entry], costs: Sequence[Entry], window: float) -> list[Path]:
    """Draw a heat map a task, `TASK.png`, and `lengths.png`; returns their paths."""
    tasks = dict.fromkeys(each["task"] for each in results)
    pictures = {
        f"{task}.png": heat_figure([each for each in results if each["task"] == task], window) for task in tasks
    }
    pictures["lengths.png"] = lengths_figure(results, costs)
    for name, figure in pictures.items():
        figure.savefig(folder / name, dpi=160)
    return [folder / name for name in pictures]


def heat_figure(results: Sequence[Entry], window: float) -> Figure:
    """Accuracy of one task by depth and length, a panel for each mode and policy.

    Below the line needles are inside the window; under each length stand its accuracy and the recency null.
    """
    kinds = _by_kind(results)
    lengths = sorted({each["length"] for each in results})
    depths = sorted({cell["depth"] for each in results for cell in each["depths"]})
    size = 1.5 + max(len(kinds) * (1.2 + 0.72 * len(lengths)), 4.5), 4.2
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    colors = colormaps["viridis"].with_extremes(bad=GRID)
    for axes, (kind, entries) in zip(panels, kinds.items(), strict=True):
        values, notes = np.full((len(depths), len(lengths)), np.nan), [""] * len(lengths)
        for each in entries:
            column = lengths.index(each["length"])
            notes[column] = f"\n{_percent(each['accuracy'])}\n{_percent(each['recency_null'])}"
            for cell in each["depths"]:
                values[depths.index(cell["depth"]), column] = cell["accuracy"]
        drawn = axes.imshow(values, aspect="auto", cmap=colors, vmin=0, vmax=1, interpolation="nearest")
        _window_edge(axes, lengths, depths, entries, window)
        axes.set_xticks(
            range(len(lengths)), [short(length) + note for length, note in zip(lengths, notes, strict=True)]
        )
        axes.set_title(", ".join(kind), fontsize=10)
    panels[0].set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
    panels[0].set_ylabel("depth of the needle (0: beginning)")
    figure.colorbar(drawn, ax=panels, label="accuracy")
    figure.suptitle(results[0]["task"], fontsize=11)
    note = "context, tokens; accuracy, %; recency null, %. Below the red line the window reaches the needle."
    figure.supxlabel(note, fontsize=9)
    return figure


def _window_edge(axes: Axes, lengths: list[int], depths: list[float], entries: Sequence[Entry], window: float) -> None:
    """A line over each column at the depth from which on a needle is inside the window of the context's end."""
    real = {each["length"]: each["real_length"]["mean"] for each in entries}
    for column, length in enumerate(lengths):
        if length in real and len(depths) > 1:
            edge = max(1 - window / real[length], 0.0)
            row = (edge - depths[0]) / (depths[-1] - depths[0]) * (len(depths) - 1)
            row = min(max(row, -0.5), len(depths) - 0.5)
            axes.plot([column - 0.5, column + 0.5], [row, row], color=ACCENT, linewidth=2.2, clip_on=False)


def lengths_figure(results: Sequence[Entry], costs: Sequence[Entry]) -> Figure:
    """Accuracy by length, a panel a task with the recency null, and what a sequence costs: state and decoding."""
    tasks = list(dict.fromkeys(each["task"] for each in results))
    figure = Figure(figsize=(3.7 * (len(tasks) + 2), 3.6), layout="constrained")
    panels = figure.subplots(1, len(tasks) + 2, squeeze=False)[0]
    lengths = sorted({each["length"] for each in results} | {each["length"] for each in costs})
    for axes, task in zip(panels, tasks, strict=False):
        _accuracy(axes, [each for each in results if each["task"] == task])
        axes.set_title(task, fontsize=10)
    panels[0].set_ylabel("accuracy")
    x = [each["length"] for each in costs]
    for axes, name, label in zip(panels[-2:], ("state_mib", "decode_ms"), _COSTS, strict=True):
        y = [each[name] for each in costs]
        axes.plot(x, y, color=INK, marker="o", markersize=4)
        axes.set_ylim(0, 1.1 * max(y, default=1))
        axes.set_title(label, fontsize=10)
    for axes in panels:
        _length_axis(axes, lengths)
    return figure


def _accuracy(axes: Axes, results: Sequence[Entry]) -> None:
    kinds = _by_kind(results)
    colors = colormaps["viridis"](np.linspace(0, 0.85, len(kinds)))
    for (kind, entries), color in zip(kinds.items(), colors, strict=True):
        for part, style, word in ((None, "-", ""), ("beyond", ":", ", beyond the window")):
            if part and all(each[part]["n"] == each["n"] for each in entries):
                continue  # the same once more
            scored = [(each["length"], each if part is None else each[part]) for each in entries]
            scored = [(length, score) for length, score in scored if score["n"]]
            x, y = [length for length, _ in scored], np.array([score["accuracy"] for _, score in scored])
            ends = np.array([score["interval"] for _, score in scored]).reshape(-1, 2).T
            axes.errorbar(
                x, y, np.abs(ends - y), color=color, linestyle=style, marker="o", markersize=3.5, linewidth=1.4,
                elinewidth=1, capsize=2, label=", ".join(kind) + word,
            )  # fmt: skip
    null = {each["length"]: each["recency_null"] for each in results if each["recency_null"] is not None}
    axes.plot(list(null), list(null.values()), color=ACCENT, linestyle="--", linewidth=1.3, label="recency null")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False, fontsize=7)


def _length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [short(length) for length in lengths], fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
    axes.set_xlabel("context, tokens")
    tidy(axes)


def _by_kind(results: Sequence[Entry]) -> dict[tuple[str, str], list[Entry]]:
    """The entries of each mode and policy, by length."""
    kinds: dict[tuple[str, str], list[Entry]] = {}
    for each in sorted(results, key=lambda each: each["length"]):
        kinds.setdefault((each["mode"], each["policy"]), []).append(each)
    return kinds


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}"
