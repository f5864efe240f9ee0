"""Pictures of a study: what its fit says, and what its runs say of the fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megahybrid.study import hours
from megahybrid.study.curves import parabola
from megahybrid.study.drawing import (
    BEYOND,
    LOSS,
    STAR,
    budget_label,
    dots,
    finish,
    kinds_legend,
    legend,
    log_axis,
    panels,
    power,
    star,
    styles,
)
from megahybrid.study.law.approach2 import SAME_COMPUTE
from megahybrid.study.law.law import Law
from megahybrid.study.results import Results
from megahybrid.study.run_pictures import branches_figure, cost_figure, learning_rate_figure
from megahybrid.study.table import Run
from megahybrid.training.drawing import GRID, short_number, tidy

_WIDEST = 5  # of bands, what is drawn: so many times the largest and the smallest line


def draw(folder: Path, results: Results) -> list[Path]:
    """Draw into the study's folder what there is to be drawn, and remove what an earlier report drew and this does not;
    returns the pictures' paths."""
    paths = []
    for name, make in PICTURES.items():
        figure = make(results)
        if figure is None:
            (folder / name).unlink(missing_ok=True)
        else:
            figure.savefig(folder / name, dpi=160)
            paths.append(folder / name)
    return paths


def isoflop_figure(results: Results) -> Figure:
    """Loss over parameters, a panel a kind and a curve a budget: the runs, the law between them, and where a budget is
    one of FLOPs the parabola of approach 2 with its lowest point; held-out runs are hollow."""
    budgets = sorted({_budget(run) for kind in results.kinds for run in results.of(kind)})
    colors = dict(zip(budgets, colormaps["viridis"](np.linspace(0, 0.85, len(budgets))), strict=True))
    figure, grid = panels(results.kinds)
    for axes, kind in zip(grid, results.kinds, strict=True):
        for budget, color in colors.items():
            chosen = [run for run in results.of(kind) if _budget(run) == budget]
            if chosen:
                _isoflop(axes, chosen, results.law(kind), color)
    finish(grid, "parameters", short_number)
    handles = [Line2D([], [], color=color, marker="o", label=label) for (_, label), color in colors.items()]
    handles.append(Line2D([], [], color="grey", linestyle="--", linewidth=1, label="the law"))
    handles.append(Line2D([], [], color="grey", marker="o", linestyle="", markerfacecolor="none", label="held out"))
    if any(line.get_marker() == "*" for axes in grid for line in axes.lines):
        handles.append(Line2D([], [], color="grey", marker="*", linestyle="", markersize=9, label="lowest point"))
    legend(figure, handles)
    return figure


def _budget(run: Run) -> tuple[float, str]:
    """The number may be another size's, too, in another unit."""
    return run.budget, budget_label(run)


def _isoflop(axes: Axes, runs: Sequence[Run], law: Law, color: Any) -> None:
    for run in runs:
        face = "none" if run.held_out else color
        axes.plot(run.parameters, run.loss, "o", color=color, markerfacecolor=face, markersize=4.5)
    sizes, first = np.unique([run.parameters for run in runs], return_index=True)
    line = np.geomspace(sizes[0], sizes[-1], 60)
    tokens = np.exp(np.interp(np.log(line), np.log(sizes), np.log([runs[each].tokens for each in first])))
    axes.plot(line, law.loss(line, tokens), color=color, linestyle="--", linewidth=1)
    fitted = [run for run in runs if run.fitted]
    curve = parabola(fitted) if fitted else None
    if curve is not None:
        line = np.geomspace(fitted[0].parameters, fitted[-1].parameters, 60)
        axes.plot(line, curve(line), color=color, linewidth=1.5)
        if curve.lowest is not None:
            axes.plot(curve.lowest, curve(curve.lowest), "*", color=color, markersize=12, markeredgecolor="white")


def compute_figure(results: Results) -> Figure:
    """Loss over compute: the runs, and each kind's envelope, the lowest loss that its law gives at some FLOPs, with its
    band; held-out runs are stars, with the interval that was frozen."""
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    for kind, style in styles(results).items():
        runs = results.of(kind)
        inside = [run for run in runs if run.fitted]
        dots(axes, [run.flops for run in inside], [run.loss for run in inside], style)
        _along(axes, results, kind, "loss", style)
        for run in runs:
            if run.held_out:
                star(axes, run.flops, run.loss, style)
            if run.cell in results.frozen:
                ends = results.frozen[run.cell]["interval"]
                axes.plot([run.flops] * 2, ends, color=style["color"], linewidth=2, solid_capstyle="butt")
    log_axis(axes, "x", "FLOPs", power)
    axes.set_ylabel(LOSS)
    kinds_legend(figure, results, STAR, BEYOND, line=True)
    return figure


def _along(axes: Axes, results: Results, kind: str, name: str, style: Mapping[str, Any]) -> None:
    """A line of what is best at some FLOPs, dashed beyond the fitted runs; of the loss with its band."""
    optimum = [each for each in results.fit["kinds"][kind]["optimum"] if each["flops"] <= results.horizon]
    x, y = (np.array([each[key] for each in optimum]) for key in ("flops", name))
    inside = x <= SAME_COMPUTE * max(run.flops for run in results.of(kind) if run.fitted)
    beyond = ~inside | np.append(~inside[1:], True)
    axes.plot(x[inside], y[inside], color=style["color"], linewidth=1.8)
    axes.plot(x[beyond], y[beyond], color=style["color"], linewidth=1.5, linestyle="--")
    if name == "loss":
        band = np.array([each["interval"] for each in optimum]).T
        axes.fill_between(x, *band, color=style["color"], alpha=0.15, linewidth=0)


def optimum_figure(results: Results) -> Figure:
    """The best number of parameters and of tokens over compute by each kind's law, and the parabolas' lowest points."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind, style in styles(results).items():
        _along(left, results, kind, "parameters", style)
        _along(right, results, kind, "tokens", style)
        runs = [run for run in results.of(kind) if run.fitted]
        for budget in sorted({run.budget for run in runs}):
            chosen = [run for run in runs if run.budget == budget]
            curve = parabola(chosen)
            if curve is not None and curve.lowest is not None:
                flops = np.mean([run.flops for run in chosen])
                counts = [(run.parameters, run.flops_per_token) for run in chosen]
                dots(left, flops, curve.lowest, style)
                dots(right, flops, flops / np.interp(curve.lowest, *zip(*counts, strict=True)), style)
    for axes, name in ((left, "best number of parameters"), (right, "best number of tokens")):
        log_axis(axes, "x", "FLOPs", power)
        log_axis(axes, "y", name, short_number)
    lowest = Line2D([], [], color="grey", marker="o", linestyle="", label="lowest point of a parabola")
    drawn = any(line.get_marker() != "None" for line in left.lines)
    kinds_legend(figure, results, BEYOND, *[lowest] * drawn, line=True)
    return figure


def multiplier_figure(results: Results) -> Figure | None:
    """What each kind needs for the baseline's loss, as a multiple of what the baseline needs: of FLOPs, and of GPU
    hours where they were measured; grey where no run was fitted."""
    pairs = {
        tuple(pair.split(" vs ")): near
        for pair, points in results.fit["multipliers"].items()
        if (near := [each for each in points if each["flops"] <= results.horizon])
    }
    if not pairs:
        return None
    base = results.kinds[0]
    names = ["of FLOPs"]
    if np.isfinite(hours.ratio(results, base, base, results.end, 1)):
        names.append("of GPU hours")
    figure = Figure(figsize=(5 * len(names), 4.8), layout="constrained")
    columns = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    middles = []
    for (_, kind), points in pairs.items():
        x, middle = (np.array([each[name] for each in points]) for name in ("flops", "multiplier"))
        low, high = np.array([each["interval"] for each in points]).T
        ratio = np.array([hours.ratio(results, base, kind, *each) for each in zip(x, middle, strict=True)])
        color = styles(results)[kind]["color"]
        for axes, scale in zip(columns, (1.0, ratio), strict=False):
            axes.plot(x, middle * scale, color=color, linewidth=1.8)
            axes.fill_between(x, low * scale, high * scale, color=color, alpha=0.15, linewidth=0)
            middles.append(middle * scale)
    for axes, name in zip(columns, names, strict=True):
        axes.axhline(1, color=styles(results)[base]["color"], linewidth=1.2)
        axes.set_title(name, fontsize=10)
        log_axis(axes, "x", f"FLOPs of {base}", power)
        left, right = axes.get_xlim()
        axes.axvspan(results.end, max(right, results.end), color=GRID, alpha=0.35, linewidth=0)
        axes.set_xlim(left, right)
    middles = np.append(1, np.nan_to_num(np.concatenate(middles), nan=1))
    bottom, top = columns[0].get_ylim()
    columns[0].set_yscale("log")
    columns[0].set_ylim(max(bottom, middles.min() / _WIDEST), min(top, middles.max() * _WIDEST))
    log_axis(columns[0], "y", f"times what {base} needs, at equal loss", lambda value, _: f"{value:g}")
    kinds_legend(figure, results, line=True)
    return figure


def prediction_figure(results: Results) -> Figure:
    """Losses as the law gives them and as they were; and of held-out runs the interval that was frozen and the loss
    that came, in percent of the frozen prediction."""
    held = [run for run in results.runs if run.cell in results.frozen]
    figure = Figure(figsize=(10.5, 4.8) if held else (5.8, 5), layout="constrained")
    left, *right = figure.subplots(1, 1 + bool(held), squeeze=False)[0]
    for kind, style in styles(results).items():
        law, runs = results.law(kind), [run for run in results.of(kind) if run.fitted]
        dots(left, [law.loss(run.parameters, run.tokens) for run in runs], [run.loss for run in runs], style)
    for run in held:
        if run.counts:
            frozen, style = results.frozen[run.cell], styles(results)[run.kind]
            left.plot(frozen["interval"], [run.loss] * 2, color=style["color"], linewidth=2)
            star(left, frozen["loss"], run.loss, style)
    ends = [choose(left.get_xlim() + left.get_ylim()) for choose in (min, max)]
    left.plot(ends, ends, color="grey", linewidth=0.8, zorder=0)
    left.set(xlim=ends, ylim=ends, xlabel="predicted (nats a token)", ylabel="actual (nats a token)")
    tidy(left)
    for axes in right:
        _intervals(axes, results, held)
    kinds_legend(figure, results, *[STAR] * bool(held))
    return figure


def _intervals(axes: Axes, results: Results, held: Sequence[Run]) -> None:
    for place, run in enumerate(held):
        frozen, style = results.frozen[run.cell], styles(results)[run.kind]
        ends = [100 * (each / frozen["loss"] - 1) for each in frozen["interval"]]
        axes.plot(ends, [place] * 2, color=style["color"], linewidth=9, alpha=0.3, solid_capstyle="butt")
        if run.counts:
            error = 100 * (run.loss / frozen["loss"] - 1)
            star(axes, error, place, style)
            axes.annotate(
                f"{error:+.2f} %", (error, place), (0, 11), textcoords="offset points", ha="center", fontsize=9
            )
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(held)), [f"{run.kind}\n{run.size}, {power(run.flops)}" for run in held], fontsize=9)
    axes.set_ylim(len(held) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlabel("actual against the frozen prediction, and its interval (%)")
    tidy(axes)


def residuals_figure(results: Results) -> Figure:
    """How far losses are from the law, in percent, over parameters and over tokens; held-out runs are stars."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("parameters", "tokens"), strict=True):
        for kind, style in styles(results).items():
            for run in results.of(kind):
                value = 100 * (run.loss / results.law(kind).loss(run.parameters, run.tokens) - 1)
                (dots if run.fitted else star)(axes, getattr(run, name), value, style)
        axes.axhline(0, color="grey", linewidth=0.8)
        log_axis(axes, "x", name, short_number)
    figure.axes[0].set_ylabel("actual against the law (%)")
    kinds_legend(figure, results, STAR)
    return figure


PICTURES: dict[str, Callable[[Results], Figure | None]] = {
    "isoflop.png": isoflop_figure,
    "compute.png": compute_figure,
    "optimum.png": optimum_figure,
    "multiplier.png": multiplier_figure,
    "prediction.png": prediction_figure,
    "residuals.png": residuals_figure,
    "learning_rate.png": learning_rate_figure,
    "branches.png": branches_figure,
    "cost.png": cost_figure,
}
