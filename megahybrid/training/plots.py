"""Pictures of a run, drawn from its metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from megahybrid.config.pattern import parse_pattern
from megahybrid.training.run_directory import Metrics, read_metrics

COLUMNS = 6  # layers side by side in the picture of the retention
MOST_STEPS = 2000  # of which the values of every head are drawn
LEGEND_HEADS = 8  # more heads than this are told apart by a colour scale
INK, ACCENT, GRID = "#1f3a5f", "#c8553d", "#d9d9d9"


def plot_run(run_dir: Path) -> list[Path]:
    """Draw loss.png and speed.png into the run directory, and for a model with LTE layers retention.png and heads.png;
    returns their paths.

    Raises UserError when the run has no finished step.
    """
    metrics = read_metrics(run_dir)
    pictures = {"loss.png": loss_figure(metrics), "speed.png": speed_figure(metrics)}
    if any(line.get("kept") for line in metrics):
        model = yaml.safe_load((run_dir / "config.yaml").read_text())["model"]
        layers = parse_pattern(model["pattern"]).layers("L")
        pictures["retention.png"] = retention_figure(metrics, layers, model["lte"]["buffer_size"])
        pictures["heads.png"] = heads_figure(metrics, layers)
    paths = []
    for name, figure in pictures.items():
        figure.savefig(run_dir / name, dpi=160)
        paths.append(run_dir / name)
    return paths


def loss_figure(metrics: Metrics) -> Figure:
    """Training loss, as it was and smoothed, and the validation losses over the trained tokens."""
    tokens = np.array([line["tokens"] for line in metrics], dtype=float)
    loss = np.array([line["loss"] for line in metrics], dtype=float)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(tokens, loss, color=INK, alpha=0.25, linewidth=0.8)
    axes.plot(tokens, smooth(loss), color=INK, linewidth=1.8, label="training")
    validated = [line for line in metrics if line.get("validation_loss") is not None]
    if validated:
        axes.plot(
            [line["tokens"] for line in validated],
            [line["validation_loss"] for line in validated],
            color=ACCENT,
            marker="o",
            markersize=4.5,
            linewidth=1,
            label=f"held out (last {validated[-1]['validation_loss']:.3f})",
        )
    axes.set_ylabel("loss (nats a token)")
    axes.set_xlabel("tokens")
    axes.legend(frameon=False)
    _tidy(axes)
    return figure


def retention_figure(metrics: Metrics, layers: list[int], buffer_size: int) -> Figure:
    """Kept tokens a sequence (upper panels) and lambda (lower panels), a column a layer, a line a head.

    Args:
        layers: numbers of the LTE layers, in the metrics' order.
        buffer_size: what the controller aims at, tokens.
    """
    lines = _with_heads(metrics)
    tokens = np.array([line["tokens"] for line in lines], dtype=float)
    kept = np.array([line["kept"] for line in lines], dtype=float)
    weight = np.array([line["lambda"] for line in lines], dtype=float)
    heads = kept.shape[2]
    columns = min(COLUMNS, len(layers))
    blocks = -(-len(layers) // columns)
    figure = Figure(figsize=(1.2 + max(2.6 * columns, 4.8), 4.8 * blocks), layout="constrained")
    grid = figure.subplots(2 * blocks, columns, squeeze=False)
    colors = colormaps["viridis"](np.linspace(0, 0.92, heads))
    # Zero has no place on a log axis: where lambda is zero the line stops.
    weight[weight <= 0] = np.nan
    lowest, highest = (np.nanmin(weight), np.nanmax(weight)) if np.isfinite(weight).any() else (1e-9, 1.0)
    for place in range(blocks * columns):
        block, column = divmod(place, columns)
        upper, lower = grid[2 * block, column], grid[2 * block + 1, column]
        if place >= len(layers):
            upper.set_visible(False)
            lower.set_visible(False)
            continue
        for head in range(heads):
            upper.plot(tokens, kept[:, place, head], color=colors[head], alpha=0.15, linewidth=0.6)
            upper.plot(tokens, smooth(kept[:, place, head]), color=colors[head], linewidth=1.3, label=f"head {head}")
            lower.plot(tokens, weight[:, place, head], color=colors[head], linewidth=1.3, drawstyle="steps-post")
        upper.axhline(buffer_size, color=ACCENT, linestyle="--", linewidth=1.1, label=f"buffer size {buffer_size}")
        upper.set_ylim(0, 1.05 * max(kept.max(), buffer_size))
        lower.set_yscale("log")
        lower.yaxis.set_minor_formatter(NullFormatter())
        lower.set_ylim(lowest / 5, highest * 5)
        upper.set_title(f"layer {layers[place]}", fontsize=10)
        lower.set_xlabel("tokens")
        for axes, label in ((upper, "kept tokens a sequence"), (lower, "lambda")):
            axes.set_xlim(0, tokens[-1])
            _tidy(axes)
            if column == 0:
                axes.set_ylabel(label)
            else:
                axes.tick_params(which="both", labelleft=False)
        upper.tick_params(labelbottom=False)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    if heads > LEGEND_HEADS:
        handles, labels = [handles[0], handles[-2], handles[-1]], ["head 0", f"head {heads - 1}", labels[-1]]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return figure


def speed_figure(metrics: Metrics) -> Figure:
    """Tokens a second over the trained tokens, as it was and smoothed."""
    tokens = np.array([line["tokens"] for line in metrics], dtype=float)
    speed = np.array([line["tokens_per_second"] for line in metrics], dtype=float)
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(tokens, speed, color=INK, alpha=0.25, linewidth=0.8)
    axes.plot(tokens, smooth(speed), color=INK, linewidth=1.8)
    axes.set_ylim(0, 1.05 * np.quantile(speed, 0.99))
    axes.set_ylabel("tokens a second")
    axes.set_xlabel("tokens")
    axes.yaxis.set_major_formatter(FuncFormatter(_short_number))
    _tidy(axes)
    return figure


def heads_figure(metrics: Metrics, layers: list[int]) -> Figure:
    """Heat maps of kept tokens a sequence and of lambda: a row a head, layer under layer, over the trained tokens."""
    lines = _with_heads(metrics)
    kept = np.array([line["kept"] for line in lines], dtype=float)
    weight = np.array([line["lambda"] for line in lines], dtype=float)
    steps, _, heads = kept.shape
    rows = len(layers) * heads
    figure = Figure(figsize=(9, 2 + min(0.12 * rows, 8)), layout="constrained")
    extent = (lines[0]["tokens"], lines[-1]["tokens"], rows, 0)
    # Zero has no logarithm: it takes the colour below the scale.
    lowest = weight[weight > 0].min() if (weight > 0).any() else 1e-9
    scales = {"kept tokens a sequence": None, "lambda": LogNorm(lowest, max(weight.max(), 10 * lowest))}
    for axes, values, (name, norm) in zip(
        figure.subplots(1, 2, sharey=True), (kept, weight), scales.items(), strict=True
    ):
        picture = values.reshape(steps, rows).T
        colors = colormaps["viridis"].with_extremes(under=GRID, bad=GRID)
        drawn = axes.imshow(picture, aspect="auto", extent=extent, cmap=colors, norm=norm, interpolation="nearest")
        figure.colorbar(drawn, ax=axes, label=name)
        axes.set_yticks(np.arange(len(layers)) * heads + heads / 2, [f"layer {layer}" for layer in layers])
        for border in range(heads, rows, heads):
            axes.axhline(border, color="white", linewidth=1)
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(_short_number))
    return figure


def _with_heads(metrics: Metrics) -> Metrics:
    """The lines with the values of every head, evenly thinned out to what can be drawn, the last one among them."""
    lines = [line for line in metrics if line.get("kept")]
    return lines[:: -max(1, -(-len(lines) // MOST_STEPS))][::-1]


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of about 4 % of the values, so that it does not lag; cut off at both ends."""
    count = len(values)
    reach = max(count // 50, 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(count) - reach, 0)
    after = np.minimum(np.arange(count) + reach + 1, count)
    return (sums[after] - sums[first]) / (after - first)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(_short_number))


def _short_number(value: float, _: int) -> str:
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= limit:
            return f"{value / limit:g}{suffix}"
    return f"{value:g}"
