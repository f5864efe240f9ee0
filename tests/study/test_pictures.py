"""Pictures of a study draw what its files say."""

from pathlib import Path

import numpy as np
import pytest

from megahybrid.study import hours, pictures, report, run_pictures
from megahybrid.study.answers import answers, in_hours, savings
from megahybrid.study.drawing import power, round_numbers
from tests.study import made_up


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return made_up.results(tmp_path_factory.mktemp("hybrids-1"))


def lines(axes):
    """What an axes' lines show, by colour and style, without those of one point."""
    drawn = [(each.get_color(), each.get_linestyle(), *each.get_data()) for each in axes.lines]
    return [(color, style, np.array(x), np.array(y)) for color, style, x, y in drawn if len(np.atleast_1d(x)) > 1]


def test_parabolas_and_the_law_run_through_noiseless_runs(tmp_path):
    results = made_up.results(tmp_path, made_up.runs(noise=0))
    for axes, kind in zip(pictures.isoflop_figure(results).axes, made_up.LAWS, strict=True):
        assert axes.get_title() == kind
        for budget, star in zip(
            made_up.BUDGETS, [each for each in axes.lines if each.get_marker() == "*"], strict=True
        ):
            parameters, _, loss = made_up.optimum(kind, budget)
            assert star.get_xdata()[0] == pytest.approx(parameters, rel=0.06)
            assert star.get_ydata()[0] == pytest.approx(loss, rel=0.003)
        dashed = [(x, y) for _, style, x, y in lines(axes) if style == "--" and x[0] < x[-1]]
        assert len(dashed) == len(made_up.BUDGETS)  # held-out runs have one size
        x, y = dashed[0]
        assert y == pytest.approx(made_up.loss(kind, x, 1e15 / (6 * made_up.COUNTS[kind] * x)), rel=1e-9)
        hollow = [each for each in axes.lines if str(each.get_markerfacecolor()) == "none"]
        assert [each.get_xdata()[0] for each in hollow] == [run.parameters for run in results.of(kind) if run.held_out]


def test_what_is_held_out_bends_no_parabola(tmp_path):
    rows = made_up.runs(noise=0)
    for each in rows:
        if (each["kind"], each["size"], each["budget"]) == ("gdn", "320x10", 1e16):
            each |= {"held_out": 1, "loss": 2 * each["loss"]}
    axes = pictures.isoflop_figure(made_up.results(tmp_path, rows)).axes[1]
    stars = [each.get_xdata()[0] for each in axes.lines if each.get_marker() == "*"]
    # Of the three sizes that are left the largest is below the best.
    assert axes.get_title() == "gdn" and stars == pytest.approx(
        [made_up.optimum("gdn", each)[0] for each in (1e15, 3e15)], rel=0.06
    )


def test_at_equal_tokens_the_law_is_drawn_and_no_parabola(tmp_path):
    """Budgets of tokens, which are the first kind's alone, and one of tokens a parameter."""
    rows = [
        made_up.row(kind, size, each, tokens=each / made_up.COUNTS[kind])
        for kind in made_up.LAWS
        for size in made_up.SIZES
        for each in (5e7, 1e8)
    ]
    rows += [made_up.row(kind, "320x10", 8e16, held_out=1) for kind in made_up.LAWS]
    rows += [made_up.row("gdn", "320x10", 30.0, tokens=30 * 1.04e7)]
    figure = pictures.isoflop_figure(made_up.results(tmp_path, rows))
    labels = [each.get_text() for each in figure.legends[0].texts]
    assert labels[:4] == ["30 tokens a parameter", "5e7 tokens", "1e8 tokens", "8e16 FLOPs"]
    assert "lowest point" not in labels
    for axes, kind in zip(figure.axes, made_up.LAWS, strict=True):
        assert {style for _, style, x, _ in lines(axes) if len(np.unique(x)) > 1} == {"--"}
        x, y = max(((x, y) for _, _, x, y in lines(axes) if len(np.unique(x)) > 1), key=lambda line: line[1][0])
        assert y == pytest.approx(made_up.loss(kind, x, 5e7 / made_up.COUNTS[kind]), rel=1e-9)


def test_a_number_in_two_units_is_two_budgets(tmp_path):
    rows = [made_up.row(kind, size, 1e8, tokens=1e8) for kind in made_up.LAWS for size in list(made_up.SIZES)[:2]]
    rows += [made_up.row(kind, size, 1e8, seed=1) for kind in made_up.LAWS for size in list(made_up.SIZES)[2:]]
    figure = pictures.isoflop_figure(made_up.results(tmp_path, rows))
    labels = [each.get_text() for each in figure.legends[0].texts]
    assert labels[:2] == ["1e8 FLOPs", "1e8 tokens"]
    assert [
        len({each.get_color() if isinstance(each.get_color(), str) else tuple(each.get_color()) for each in axes.lines})
        for axes in figure.axes
    ] == [2, 2, 2]


def test_envelope_and_optimum_are_the_fits(results):
    (axes,) = pictures.compute_figure(results).axes
    points = results.fit["kinds"]["gdn"]["optimum"]
    solid, dashed = [(x, y) for color, _, x, y in lines(axes) if color == "#c8553d" and len(np.unique(x)) > 2][-2:]
    points = [each for each in points if each["flops"] <= 7.5e17]  # that of the target is the farthest
    joined = np.append(solid[0], dashed[0][1:]), np.append(solid[1], dashed[1][1:])
    assert solid[0][-1] == dashed[0][0] == 1e16
    assert np.array_equal(joined, [[each[name] for each in points] for name in ("flops", "loss")])
    for axes, name in zip(pictures.optimum_figure(results).axes, ("parameters", "tokens"), strict=True):
        drawn = [y for color, style, x, y in lines(axes) if color == "#c8553d" and style == "-"]
        assert drawn[0].tolist() == [each[name] for each in points if each["flops"] <= 1.01e16]


def test_residuals_are_the_noise(tmp_path):
    results = made_up.results(tmp_path, made_up.runs(noise=0.002))
    for axes, name in zip(pictures.residuals_figure(results).axes, ("parameters", "tokens"), strict=True):
        drawn = sorted((*each.get_xdata(), *each.get_ydata()) for each in axes.lines if len(each.get_xdata()) == 1)
        expected = sorted(
            (getattr(run, name), 100 * (run.loss / made_up.loss(kind, run.parameters, run.tokens) - 1))
            for kind in made_up.LAWS for run in results.of(kind)
        )  # fmt: skip
        assert np.allclose(drawn, expected, atol=1e-9) and len(drawn) == 45


def test_predictions_stand_beside_what_came(results):
    left, right = pictures.prediction_figure(results).axes
    held = [run for run in results.runs if run.held_out]
    bars = [x for _, _, x, y in lines(right) if y[0] == y[1]]
    assert np.allclose(bars, [[-0.2, 0.2]] * 3)
    stars = [each.get_xdata()[0] for each in right.lines if each.get_marker() == "*"]
    losses = [made_up.loss(run.kind, run.parameters, run.tokens) for run in held]
    assert stars == pytest.approx([100 * (run.loss / each - 1) for run, each in zip(held, losses, strict=True)])
    assert [each.get_text() for each in right.texts] == [f"{each:+.2f} %" for each in stars]
    dots = [each for each in left.lines if each.get_linestyle() == "None" and len(each.get_xdata()) == 14]
    for kind, each in zip(made_up.LAWS, dots, strict=True):
        assert each.get_ydata().tolist() == [run.loss for run in results.of(kind) if run.fitted]


def test_hours_multiply_by_what_a_flop_takes_where_each_kind_is_best(tmp_path):
    """In the measured range an hour a FLOP is HOURS · (1 + 1e6 / parameters), at the sizes exactly."""
    results = made_up.results(tmp_path, made_up.runs(noise=0))
    saving = savings(results, 1e16)[1]
    assert (saving.base, saving.kind) == ("transformer", "lalte")
    assert saving.times == pytest.approx(made_up.multiplier("transformer", "lalte", 1e16), rel=1e-6)

    def rate(kind, flops):
        return made_up.HOURS[kind] * (1 + 1e6 / made_up.optimum(kind, flops)[0])

    expected = saving.times * rate("lalte", 1e16 * saving.times) / rate("transformer", 1e16)
    assert in_hours(results, saving).times == pytest.approx(expected, rel=0.01)
    left, right = pictures.multiplier_figure(results).axes
    for axes, each in ((left, saving), (right, in_hours(results, saving))):
        drawn = {color: (x, y) for color, _, x, y in lines(axes) if len(x) > 2}
        x, y = drawn["#3d8361"]
        assert np.interp(np.log(1e16), np.log(x), y) == pytest.approx(each.times, rel=1e-6)
    branches = [
        each | {"gpu_hours": 1e-9} for each in made_up.branched("lalte", tokens=(1e8, 1.1e8, 1.2e8, 1.3e8, 1.4e8))[:4]
    ]  # their hours are a part's
    more = made_up.results(tmp_path, [*made_up.runs(noise=0), *branches])
    assert in_hours(more, saving).times == in_hours(results, saving).times
    unmeasured = [row | {"gpu_hours": ""} for row in made_up.runs()]
    results = made_up.results(tmp_path, unmeasured)
    assert in_hours(results, savings(results, 1e16)[0]) is None
    assert not any("GPU hours as measured" in each for each in answers(results))


def test_learning_rates_have_their_lowest_point(results):
    for axes in run_pictures.learning_rate_figure(results).axes:
        (star,) = [each for each in axes.lines if each.get_marker() == "*"]
        assert star.get_xdata()[0] == pytest.approx(2e-3 * made_up.BEST_FACTOR, rel=1e-3)
        assert [each.get_text() for each in axes.get_legend().texts] == ["128x4, 3e15 FLOPs: lowest at 1.8e-3"]


def test_branches_lie_with_their_trunk_on_the_law(tmp_path):
    results = made_up.results(tmp_path, made_up.branched() + made_up.branched("lalte")[-1:] + made_up.runs(noise=0))
    (axes,) = run_pictures.branches_figure(results).axes
    assert axes.get_title() == "gdn"
    law, branches, trunk = axes.lines
    family = made_up.branched()
    for drawn, rows in ((branches, family[:2]), (trunk, family[2:])):
        assert drawn.get_xdata().tolist() == [each["tokens"] for each in rows]
        assert drawn.get_ydata() == pytest.approx([each["loss"] for each in rows])
    assert law.get_ydata()[-1] == pytest.approx(family[-1]["loss"]) and law.get_xdata()[0] == pytest.approx(5e7)


def test_costs_are_those_of_the_plan_and_of_the_runs(results):
    figure = run_pictures.cost_figure(results)
    (axes,) = figure.axes
    labels = [each.get_text() for each in axes.get_yticklabels()]
    assert labels[:5] == [
        "transformer 128x4",
        "transformer 192x6",
        "transformer 256x8",
        "transformer 320x10",
        "gdn 128x4",
    ]
    widths = np.array([[bar.get_width() for bar in each] for each in axes.containers])
    rows = [each for each in made_up.runs() if (each["kind"], each["size"]) == ("gdn", "192x6")]
    assert widths[0, 5] == pytest.approx(sum(each["flops"] / 3e18 * 22 for each in rows))
    used = {state: sum(each["gpu_hours"] for each in rows if each["state"] == state) for state in ("done", "diverged")}
    assert widths[1:, 5] == pytest.approx([used["done"], 0, used["diverged"]])
    total = sum(sum(part.values()) for part in hours.by_use(results.runs).values())
    assert widths[1:].sum() == pytest.approx(total)
    assert f"GPU hours: {total:.3g} of {widths[0].sum():.3g} planned" in report.text(results, Path("study.yaml"), [])


def test_round_numbers():
    assert round_numbers(0.9e6, 11e6) == [1e6, 2e6, 3e6, 5e6, 1e7]
    assert round_numbers(8e14, 2e18) == [1e15, 1e16, 1e17, 1e18]
    assert [power(each) for each in (3e18, 1.5e-3, 3.16e15)] == ["3e18", "1.5e-3", "3.2e15"]
