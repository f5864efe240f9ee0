"""What the pictures show is what the results say."""

import matplotlib.image
import numpy as np
import pytest

from megahybrid.evaluation import pictures
from megahybrid.evaluation.results import summarise
from tests.evaluation.test_results import line

WINDOW, DEPTHS = 100, (0.0, 0.5, 1.0)


@pytest.fixture
def results():
    lines = [
        line(n, [int(depth * length > 300)], [int((1 - depth) * length < WINDOW)], length, depth, policy=policy)
        for policy in ("learned", "recency") for length in (512, 1024) for n, depth in enumerate(DEPTHS)
    ]  # fmt: skip
    return summarise("niah_single_1", lines)


def test_the_heat_map_has_a_cell_a_depth_and_length_and_the_edge_of_the_window(results):
    figure = pictures.heat_figure(results, WINDOW)
    panels = figure.axes[:2]
    assert [axes.get_title() for axes in panels] == ["forced, learned", "forced, recency"]
    for axes in panels:
        assert axes.images[0].get_array().tolist() == [[0, 0], [0, 1], [1, 1]]
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert labels == ["512\n33\n33", "1k\n67\n33"]
        edges = [each.get_ydata()[0] for each in axes.lines]
        assert edges == pytest.approx([2 * (1 - WINDOW / 511), 2 * (1 - WINDOW / 1023)])


def test_lengths_show_accuracy_the_null_and_costs(results):
    costs = [{"length": 512, "state_mib": 3.0, "decode_ms": 1.0}, {"length": 1024, "state_mib": 6.0, "decode_ms": 1.0}]
    accuracy, state, decode = pictures.lengths_figure(results, costs).axes
    lines = {each.get_label(): each for each in accuracy.lines}
    assert lines["recency null"].get_ydata().tolist() == pytest.approx([1 / 3] * 2, abs=1e-6)
    bars = {each.get_label(): each for each in accuracy.containers}
    assert set(bars) == {
        f"forced, {each}{more}" for each in ("learned", "recency") for more in ("", ", beyond the window")
    }
    for each in results:
        each["beyond"] = each  # nothing else, and nothing to draw twice
    again = pictures.lengths_figure(results, costs).axes[0].containers
    assert {each.get_label() for each in again} == {"forced, learned", "forced, recency"}
    drawn = bars["forced, learned"].lines[0]
    assert drawn.get_xdata().tolist() == [512, 1024]
    assert drawn.get_ydata().tolist() == pytest.approx([1 / 3, 2 / 3], abs=1e-6)
    assert state.lines[0].get_ydata().tolist() == [3, 6] and decode.lines[0].get_ydata().tolist() == [1, 1]


def test_files_are_drawn(results, tmp_path):
    drawn = pictures.draw(tmp_path, results, [{"length": 512, "state_mib": 3.0, "decode_ms": 1.0}], WINDOW)
    assert [path.name for path in drawn] == ["niah_single_1.png", "lengths.png"]
    for path in drawn:
        picture = matplotlib.image.imread(path)
        assert min(picture.shape[:2]) > 400 and np.unique(picture.reshape(-1, 4), axis=0).shape[0] > 10
