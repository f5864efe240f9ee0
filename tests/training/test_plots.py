import json
import math
from pathlib import Path

import numpy as np
import pytest

from megahybrid.config import load_config
from megahybrid.errors import UserError
from megahybrid.mixers.lte.controller import LambdaController
from megahybrid.training import plots, report
from megahybrid.training.plots import members_figure, panels_figure, plot_run, smooth, speed_figure
from megahybrid.training.probes.pictures import probes_figure

STEPS, LAYERS, HEADS, BUFFER = 30, [1, 3], 2, 64
WITH_HEADS = np.arange(3, STEPS + 1, 3)  # the steps whose lines have the values of every head
CONFIG = f"""
run: {{dir: unused}}
model: {{pattern: (GL)*2, hidden_size: 32, vocab_size: 384, lte: {{buffer_size: {BUFFER}}}}}
train: {{seq_length: 100, micro_batch_size: 1, global_batch_size: 1, steps: {STEPS}}}
data: {{path: unused}}
"""


def write_run(run_dir: Path, retention: bool = True) -> None:
    (run_dir / "config.yaml").write_text(CONFIG)
    with open(run_dir / "metrics.jsonl", "w") as file:
        for step in range(1, STEPS + 1):
            line = {"step": step, "tokens": 100 * step, "loss": 5 - 0.1 * step, "tokens_per_second": 50.0 * step}
            if retention and step in WITH_HEADS:
                line |= {"kept": [[90.0 - step, 70.0]] * 2, "lambda": [[0.0, 1e-3]] * 2}
            if step % 10 == 0:
                line["validation_loss"] = line["loss"] + 0.25
            file.write(json.dumps(line) + "\n")
        file.write('{"step": 31, "tok')


def test_unigram_entropy_of_known_distributions():
    assert report.unigram_entropy(np.repeat(np.arange(7), 5)) == pytest.approx(math.log(7), rel=1e-12)
    assert report.unigram_entropy([[3, 3], [3, 3]]) == 0
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert report.unigram_entropy([9, 0, 9, 9]) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="no tokens"):
        report.unigram_entropy([])


def test_a_torn_last_line_is_left_out_and_a_torn_inner_line_is_not(tmp_path):
    write_run(tmp_path)
    assert [line["step"] for line in report.read_metrics(tmp_path)] == list(range(1, STEPS + 1))
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "to\n' + path.read_text())
    with pytest.raises(UserError, match="Line 1 of"):
        report.read_metrics(tmp_path)


def test_mean_speed_is_tokens_by_time(tmp_path):
    write_run(tmp_path)
    seconds = sum(100 / (50 * step) for step in range(1, STEPS + 1))
    assert report.mean_tokens_per_second(report.read_metrics(tmp_path)) == pytest.approx(100 * STEPS / seconds)


def test_kept_tokens_are_a_mean_over_the_last_steps_that_have_them(tmp_path):
    write_run(tmp_path)
    metrics = report.read_metrics(tmp_path)
    assert np.allclose(report.latest(metrics, "kept", steps=6), [[90 - (30 + 27) / 2, 70]] * 2)
    assert np.allclose(report.latest(metrics[:-1], "kept", steps=1), [[90 - 27, 70]] * 2)
    assert report.latest(metrics[:2], "kept") is None


def quantities(run_dir):
    return LambdaController.quantities(load_config(run_dir / "config.yaml"))


def test_pictures_are_written(tmp_path):
    write_run(tmp_path)
    paths = plot_run(tmp_path)
    assert [path.name for path in paths] == ["loss.png", "speed.png", "retention.png", "retention-heads.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_without_regulated_layers_there_is_no_picture_of_them(tmp_path):
    write_run(tmp_path, retention=False)
    assert [path.name for path in plot_run(tmp_path)] == ["loss.png", "speed.png"]


def test_retention_panels_show_the_kept_counts_and_the_buffer_size(tmp_path):
    write_run(tmp_path)
    figure = panels_figure(report.read_metrics(tmp_path), LAYERS, quantities(tmp_path), "head")
    upper = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert set(upper) == {"layer 1", "layer 3"}
    lines = upper["layer 3"].get_lines()
    drawn = {line.get_label(): line.get_ydata() for line in lines}
    assert set(drawn["buffer size 64"]) == {BUFFER}
    assert np.array_equal(lines[0].get_ydata(), 90.0 - WITH_HEADS)
    assert np.array_equal(lines[0].get_xdata(), 100 * WITH_HEADS)
    assert np.allclose(drawn["head 1"], 70)
    assert {axes.get_yscale() for axes in figure.axes} == {"linear", "log"}


def test_the_heat_maps_have_a_row_a_head_and_the_speed_its_steps(tmp_path):
    write_run(tmp_path)
    metrics = report.read_metrics(tmp_path)
    figure = members_figure(metrics, LAYERS, quantities(tmp_path))
    maps = [axes.get_images()[0] for axes in figure.axes if axes.get_images()]
    kept, weight = (each.get_array() for each in maps[:2])
    assert kept.shape == weight.shape == (len(LAYERS) * HEADS, len(WITH_HEADS))
    assert np.array_equal(kept[0], 90.0 - WITH_HEADS) and np.allclose(kept[1], 70)
    assert np.allclose(weight[3], 1e-3) and np.ma.filled(weight[2], 0).max() == 0
    (axes,) = speed_figure(metrics).axes
    assert np.array_equal(axes.get_lines()[0].get_ydata(), 50.0 * np.arange(1, STEPS + 1))


def test_a_long_run_is_thinned_out_to_its_end(tmp_path, monkeypatch):
    write_run(tmp_path)
    monkeypatch.setattr(plots, "MOST_STEPS", 4)
    figure = panels_figure(report.read_metrics(tmp_path), LAYERS, quantities(tmp_path), "head")
    assert figure.axes[0].get_lines()[0].get_xdata().tolist() == [300, 1200, 2100, 3000]


def test_smoothing_keeps_a_straight_line_and_the_mean_of_noise():
    line = np.arange(500.0)
    assert np.allclose(smooth(line)[10:-10], line[10:-10])
    noise = np.random.default_rng(0).normal(size=500)
    assert smooth(noise).std() < 0.4 * noise.std()


def test_summary_compares_the_loss_with_the_entropy_of_the_held_out_tokens(tmp_path, monkeypatch):
    write_run(tmp_path)
    monkeypatch.setattr(report, "held_out_tokens", lambda run_dir: np.arange(100) % 20)
    text = report.summarise(tmp_path)
    loss, entropy = 5 - 0.1 * STEPS + 0.25, math.log(20)
    for value in (
        f"{loss:.4f}",
        f"{entropy:.4f}",
        f"{entropy - loss:.4f}",
        f"{100 * STEPS:,}",
        f"buffer size {BUFFER}",
    ):
        assert value in text


PROBED = {
    "probe_position_loss": [6.0, 5.0, None, 4.0],
    "probe_gain": 0.125,
    "probe_hit_loss": [1.0, 2.0, None],
    "probe_other_loss": 3.5,
    "probe_accuracy_niah_64": [1.0, 0.25],
    "probe_nll_niah_64": [0.1, 2.0],
    "probe_recency_null_niah_64": 0.375,
    "probe_kept_niah_64": 0.5,
    "probe_by_layer_niah_64": [None, 0.5],
    "probe_held_niah_64": 0.75,
    "probe_given_niah_64": [0.0, 0.625],
    "probe_seconds": 0.1,
}


def write_probed_run(run_dir, probed):
    write_run(run_dir, retention=False)
    lines = report.read_metrics(run_dir)
    lines = [line | (probed if line["step"] % 10 == 0 else {}) for line in lines]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def test_probes_are_drawn_over_the_tokens(tmp_path):
    lines = write_probed_run(tmp_path, PROBED)
    assert [path.name for path in plot_run(tmp_path)] == ["loss.png", "speed.png", "probes.png"]
    panels = {axes.get_title(): axes for axes in probes_figure(lines).axes if axes.get_title()}
    drawn = {
        title: {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
        for title, axes in panels.items()
    }
    at = [1000, 2000, 3000]
    assert len(panels["loss by position"].get_lines()) == 3
    curve = panels["loss by position"].get_lines()[-1]
    assert list(curve.get_xdata()) == [0.5, 1.5, 2.5, 4.5] and list(curve.get_ydata())[::3] == [6, 4]
    assert (at, [0.125] * 3) in drawn["gain beyond the window"].values()
    assert drawn["loss of repeated bigrams"]["at most 4w ago"] == (at, [2] * 3)
    answers = drawn["niah_64"]
    assert answers["inside the window"] == (at, [1] * 3) and answers["beyond it"] == (at, [0.25] * 3)
    assert answers["all"][1] == pytest.approx([0.375 + 0.625 * 0.25] * 3)
    assert set(answers["recency null of all, 0.38"][1]) == {0.375}
    assert drawn["niah_64, beyond the window"]["right if one does"] == (at, [0.625] * 3)


@pytest.mark.parametrize("key", ["probe_position_loss", "probe_gain", "probe_hit_loss", "probe_kept_niah_64"])
def test_a_picture_shows_what_was_probed_alone(key, tmp_path):
    wanted = {name: value for name, value in PROBED.items() if name[:9] == key[:9] or "seconds" in name}
    wanted |= {name: PROBED[name] for name in ("probe_other_loss", "probe_held_niah_64", "probe_given_niah_64")}
    lines = write_probed_run(tmp_path, wanted)
    assert len([axes for axes in probes_figure(lines).axes if axes.get_title()]) == 1


def test_nothing_inside_the_window_leaves_a_gap(tmp_path):
    lines = write_probed_run(
        tmp_path, PROBED | {"probe_accuracy_niah_64": [None, 0.5], "probe_recency_null_niah_64": 0.0}
    )
    (panel,) = [axes for axes in probes_figure(lines).axes if axes.get_title() == "niah_64"]
    values = {line.get_label(): list(line.get_ydata()) for line in panel.get_lines()}
    assert np.isnan(values["inside the window"]).all() and values["all"] == [0.5] * 3
