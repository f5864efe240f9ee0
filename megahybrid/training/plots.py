"""Pictures of a run, drawn from its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from megahybrid.config import Config, load_config
from megahybrid.config.pattern import parse_pattern
from megahybrid.model.regulation import Quantity, regulators
from megahybrid.training.drawing import ACCENT, GRID, INK, over_tokens, short_number
from megahybrid.training.probes import names
from megahybrid.training.probes.pictures import probes_figure
from megahybrid.training.run_directory import Metrics, read_metrics

COLUMNS = 6  # layers side by side
MOST_STEPS = 2000  # of which the regulated quantities are drawn
LEGEND_MEMBERS = 8  # more lines than this are told apart by a colour scale


def plot_run(run_dir: Path) -> list[Path]:
    """Draw loss.png and speed.png into the run directory, two pictures for each regulated kind of layer, and probes.png
    of what probes found; returns their paths.

    Raises UserError when the run has no finished step.
    """
    metrics = read_metrics(run_dir)
    pictures = {"loss.png": loss_figure(metrics), "speed.png": speed_figure(metrics)}
    pictures |= regulation_pictures(load_config(run_dir / "config.yaml"), metrics)
    if any(names.SECONDS in line for line in metrics):
        pictures["probes.png"] = probes_figure(metrics)
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
    over_tokens(axes)
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
    axes.yaxis.set_major_formatter(FuncFormatter(short_number))
    over_tokens(axes)
    return figure


def regulation_pictures(config: Config, metrics: Metrics) -> dict[str, Figure]:
    """By file name, two pictures of what each kind of layer in the pattern regulates, as far as it stands there."""
    pattern, pictures = parse_pattern(config.model.pattern), {}
    for letter, regulator in regulators(pattern).items():
        quantities, layers = regulator.quantities(config), pattern.layers(letter)
        if any(line.get(quantities[0].key) for line in metrics):
            pictures[f"{regulator.name}.png"] = panels_figure(metrics, layers, quantities, regulator.member)
            pictures[f"{regulator.name}-{regulator.member}s.png"] = members_figure(metrics, layers, quantities)
    return pictures


def panels_figure(metrics: Metrics, layers: list[int], quantities: Sequence[Quantity], member: str) -> Figure:
    """Quantities one under another, a column a layer, a line a member.

    Args:
        layers: numbers of the regulated layers, in the metrics' order.
        member: what a layer has several values of, such as a head.
    """
    tokens, values = _regulated(metrics, quantities)
    columns = min(COLUMNS, len(layers))
    blocks = -(-len(layers) // columns)
    size = 1.2 + max(2.6 * columns, 4.8), 2.4 * len(quantities) * blocks
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(quantities) * blocks, columns, squeeze=False)
    for place in range(blocks * columns):
        block, column = divmod(place, columns)
        panels = grid[len(quantities) * block :][: len(quantities), column]
        if place >= len(layers):
            for axes in panels:
                axes.set_visible(False)
            continue
        for axes, quantity, all_values in zip(panels, quantities, values, strict=True):
            _draw(axes, tokens, all_values[:, place], quantity, member)
            _scale(axes, quantity, all_values)
            axes.set_xlim(0, tokens[-1])
            over_tokens(axes)
            if column == 0:
                axes.set_ylabel(quantity.label)
            else:
                axes.tick_params(which="both", labelleft=False)
            axes.tick_params(labelbottom=axes is panels[-1])
        panels[0].set_title(f"layer {layers[place]}", fontsize=10)
        panels[-1].set_xlabel("tokens")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    members = values[0].shape[2]
    if members > LEGEND_MEMBERS:  # the first, the last, and the target, if there is one
        few = [0, *range(members - 1, len(labels))]
        handles, labels = [handles[n] for n in few], [labels[n] for n in few]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return figure


def _draw(axes: Axes, tokens: np.ndarray, values: np.ndarray, quantity: Quantity, member: str) -> None:
    """Lines of values `[lines, members]`, and of the target."""
    # Zero has no place on a log axis: where a value is zero the line stops.
    values = np.where(values > 0, values, np.nan) if quantity.log else values
    colors = colormaps["viridis"](np.linspace(0, 0.92, values.shape[1]))
    for number, (each, color) in enumerate(zip(values.T, colors, strict=True)):
        label = f"{member} {number}"
        if quantity.steered:
            axes.plot(tokens, each, color=color, linewidth=1.3, drawstyle="steps-post", label=label)
        else:
            axes.plot(tokens, each, color=color, alpha=0.15, linewidth=0.6)
            axes.plot(tokens, smooth(each), color=color, linewidth=1.3, label=label)
    if quantity.target is not None:
        word, target = quantity.target
        axes.axhline(target, color=ACCENT, linestyle="--", linewidth=1.1, label=f"{word} {target:g}")


def _scale(axes: Axes, quantity: Quantity, values: np.ndarray) -> None:
    """The same vertical axis for all layers."""
    if quantity.log:
        lowest, highest = _positive_range(values)
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(lowest / 5, highest * 5)
    else:
        ends = [0, values.min(), values.max(), *(quantity.target or ())[1:]]
        axes.set_ylim(1.05 * min(ends), 1.05 * max(ends))


def _positive_range(values: np.ndarray) -> tuple[float, float]:
    positive = values[values > 0]
    return (positive.min(), positive.max()) if positive.size else (1e-9, 1.0)


def members_figure(metrics: Metrics, layers: list[int], quantities: Sequence[Quantity]) -> Figure:
    """Heat maps of the quantities side by side: a row a member, layer under layer, over the trained tokens."""
    tokens, values = _regulated(metrics, quantities)
    members = values[0].shape[2]
    rows = len(layers) * members
    figure = Figure(figsize=(4.5 * len(quantities), 2 + min(0.12 * rows, 8)), layout="constrained")
    extent = (tokens[0], tokens[-1], rows, 0)
    columns = figure.subplots(1, len(quantities), sharey=True, squeeze=False)[0]
    for axes, quantity, each in zip(columns, quantities, values, strict=True):
        lowest, highest = _positive_range(each)
        # Zero has no logarithm: it takes the colour below the scale.
        norm = LogNorm(lowest, max(highest, 10 * lowest)) if quantity.log else None
        picture = each.reshape(len(tokens), rows).T
        colors = colormaps["viridis"].with_extremes(under=GRID, bad=GRID)
        drawn = axes.imshow(picture, aspect="auto", extent=extent, cmap=colors, norm=norm, interpolation="nearest")
        figure.colorbar(drawn, ax=axes, label=quantity.label)
        axes.set_yticks(np.arange(len(layers)) * members + members / 2, [f"layer {layer}" for layer in layers])
        for border in range(members, rows, members):
            axes.axhline(border, color="white", linewidth=1)
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(short_number))
    return figure


def _regulated(metrics: Metrics, quantities: Sequence[Quantity]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Tokens `[lines]` and each quantity `[lines, layers, members]` of the lines that have them, evenly thinned out to
    what can be drawn, the last one among them."""
    lines = [line for line in metrics if line.get(quantities[0].key)]
    lines = lines[:: -max(1, -(-len(lines) // MOST_STEPS))][::-1]
    values = [np.array([line[quantity.key] for line in lines], dtype=float) for quantity in quantities]
    return np.array([line["tokens"] for line in lines], dtype=float), values


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of about 4 % of the values, so that it does not lag; cut off at both ends."""
    count = len(values)
    reach = max(count // 50, 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(count) - reach, 0)
    after = np.minimum(np.arange(count) + reach + 1, count)
    return (sums[after] - sums[first]) / (after - first)
