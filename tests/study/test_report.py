"""A report says what the figures say, and its pictures draw them."""

import math
from pathlib import Path

import matplotlib.image
import pytest

from megahybrid.errors import UserError
from megahybrid.study import pictures, report, run_pictures
from megahybrid.study.answers import answers, open_questions, savings
from megahybrid.study.file import Study
from megahybrid.study.fit import fit
from megahybrid.study.results import read_results
from tests.study import made_up

FILE = Path("studies/hybrids-1.yaml")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A study with its report."""
    folder = made_up.write(tmp_path_factory.mktemp("studies") / "hybrids-1")
    return folder, report.write(folder, FILE)


@pytest.mark.parametrize(
    ("times", "interval", "said"),
    [
        (0.8, [0.7, 0.9], "gdn needs 20 % less compute than transformer for the same loss"),
        (1.25, [1.1, 1.4], "gdn needs 25 % more compute than transformer for the same loss"),
        (0.98, [0.9, 1.1], "gdn and transformer cannot be told apart"),
    ],
)
def test_the_sentence_on_compute_follows_the_interval(times, interval, said, tmp_path):
    def change(made):
        for point in made["multipliers"]["transformer vs gdn"]:
            point |= {"multiplier": times, "interval": interval}

    results = made_up.results(tmp_path, change=change)
    figures = f"{times} times the FLOPs (95 % interval {interval[0]} to {interval[1]})"
    assert answers(results)[0].startswith(
        f"**{said}**: {figures}, at 1e16 FLOPs of transformer, where fitted runs end, each at the size that its law"
    )
    open_question = f"Whether gdn or transformer needs less compute: the interval, {times} "
    assert any(each.startswith(open_question) for each in open_questions(results)) == (interval[0] < 1 < interval[1])


@pytest.mark.parametrize(("low", "known"), [(0.99, False), (1.01, True)])
def test_kinds_are_ordered_by_what_one_needs_for_the_others_loss(low, known, tmp_path):
    """Not by whether their intervals against the baseline overlap."""

    def change(made):
        for point in made["multipliers"]["gdn vs lalte"]:
            point |= {"multiplier": 1.2, "interval": [low, 1.4]}

    results = made_up.results(tmp_path, change=change)
    said = f"**{'lalte needs 20 % more compute than gdn' if known else 'lalte and gdn cannot be told apart'}"
    assert sum(each.startswith(said) for each in answers(results)) == 1
    assert ("Whether lalte or gdn needs less compute" in " ".join(open_questions(results))) != known


def test_held_out_runs_of_equal_flops_stand_beside_each_other(tmp_path):
    rows = made_up.runs(noise=0)
    losses = {each["kind"]: each["loss"] for each in rows if each["held_out"]}
    for each in rows:
        if each["held_out"] and each["kind"] != "transformer":
            each["loss"] = losses["transformer"] * (1.02 if each["kind"] == "gdn" else 0.97)
    predicted = {kind: 100 * (loss / losses["transformer"] - 1) for kind, loss in losses.items()}
    (said,) = [each for each in answers(made_up.results(tmp_path, rows)) if each.startswith("At 8e16 FLOPs, one run")]
    assert f"transformer came at {losses['transformer']:.4f}, gdn at " in said
    assert f"(+2.0 %, by the predictions {predicted['gdn']:+.1f} %)" in said
    assert f"(-3.0 %, by the predictions {predicted['lalte']:+.1f} %)" in said
    for each in rows:  # at other FLOPs nothing is compared
        if each["held_out"] and each["kind"] == "transformer":
            each["flops"] *= 1.05
    assert not any("one run each" in each for each in answers(made_up.results(tmp_path, rows)))


@pytest.mark.parametrize(("factor", "place"), [(1.0019, "inside"), (1.0021, "outside"), (0.9979, "outside")])
def test_a_forecast_is_judged_by_its_frozen_interval(factor, place, tmp_path):
    """The fit's own prediction, which saw more, does not count."""
    rows = made_up.runs(noise=0)
    held = next(each for each in rows if each["held_out"] and each["kind"] == "gdn")
    expected = held["loss"]
    held["loss"] *= factor

    def widen(made):
        made["kinds"]["gdn"]["predictions"][0] |= {"interval": [0, 9], "covered": True}

    results = made_up.results(tmp_path, rows, widen)
    (said,) = [each for each in answers(results) if each.startswith("gdn, 8 times the FLOPs")]
    assert f"{expected:.4f} ({0.998 * expected:.4f} to {1.002 * expected:.4f}) nats a token were predicted" in said
    assert said.endswith(f"{held['loss']:.4f} came: {100 * (factor - 1):+.2f} %, {place} the interval.")
    right = 3 - (place == "outside")
    right = f"**{right} of 3 frozen predictions were right**: the loss came inside the 95 % interval, ± 0.2 %."
    assert right in answers(results)
    distrust = "How far to trust the intervals of gdn"
    assert any(each.startswith(distrust) for each in open_questions(results)) == (place == "outside")


def test_what_is_not_known_yet_is_said(tmp_path):
    rows = made_up.runs()
    held = next(each for each in rows if each["held_out"] and each["kind"] == "gdn")
    held |= {"state": "running", "loss": ""}
    results = made_up.results(tmp_path, rows, frozen=lambda made: made.pop(made_up.identity("lalte-320x10-8e16-s0")))
    said = answers(results)
    assert any(each.startswith("**1 of 1 frozen") for each in said)
    assert any(each.startswith("gdn, 8 times") and each.endswith("the run is not done (running).") for each in said)
    for kind, known in (("gdn", False), ("lalte", False), ("transformer", True)):
        unknown = f"Whether the law of {kind} predicts: no held-out run that was predicted before it began is done."
        assert (unknown in open_questions(results)) != known


def test_what_was_predicted_of_another_run_or_too_late_is_no_prediction(tmp_path):
    def change(made):
        made[made_up.identity("gdn-320x10-8e16-s0")]["frozen"] = "2026-01-02T03:04:06+00:00"
        made["another"] = made.pop(made_up.identity("lalte-320x10-8e16-s0"))

    results = made_up.results(tmp_path, frozen=change)
    said = answers(results)
    assert any(each.startswith("**1 of 1 frozen") for each in said)
    assert any(each.startswith("gdn, 8 times") and "The run had begun when that was written." in each for each in said)
    assert not any(each.startswith("lalte, 8 times") for each in said)
    for kind in ("gdn", "lalte"):
        unknown = f"Whether the law of {kind} predicts: no held-out run that was predicted before it began is done."
        assert unknown in open_questions(results)


def test_runs_left_out_are_named_with_why(written):
    folder, _ = written
    text = (folder / "report.md").read_text()
    count = len(made_up.runs())
    assert f"{count} runs: 42 fitted, 3 held out and done, 15 of the tuning grid, " in text
    assert "1 diverged (gdn-192x6-3e15-s1) and 1 missing (lalte-192x6-1e16-s1)." in text
    table = text.split("## Left out")[1].split("##")[0]
    assert sum(each["cell"] in table for each in made_up.runs()) == 17


def test_a_second_try_is_not_merged_in_silence(tmp_path):
    rows = made_up.runs()
    first = rows[-2] | {
        "cell": "gdn-192x6-3e15-s1-half",
        "run": "anew",
        "retry_of": rows[-2]["run"],
        "learning_rate": 1e-3,
    }
    for changes, place in (
        ({"state": "done", "loss": 5.6, "excluded": ""}, "in its place"),
        ({"state": "running", "excluded": "running"}, "which is not done (running)"),
    ):
        said = f"gdn-192x6-3e15-s1-half is gdn-192x6-3e15-s1 again at a learning rate of 1e-3, {place}."
        assert said in answers(made_up.results(tmp_path, [*rows, first | changes]))


def test_warnings_and_the_same_runs_without_a_repeat(tmp_path):
    warning = "Without 2 runs the exponent changes by 0.1."
    rows = [each for each in made_up.runs() if each["seed"] == 0]
    results = made_up.results(tmp_path, rows, lambda made: made["warnings"].append(warning))
    assert f"The fit warns: {warning}" in answers(results)
    assert "How much two seeds differ: no run was repeated." in open_questions(results)
    assert not any("two seeds" in each for each in open_questions(made_up.results(tmp_path)))
    assert any(
        "1e16 FLOPs, where no run was fitted: held-out runs test it at 8e16" in each for each in open_questions(results)
    )


def test_a_held_out_run_of_no_more_flops_tests_nothing_beyond(tmp_path):
    rows = made_up.runs()
    for each in rows:
        if each["held_out"]:
            each |= {name: each[name] * 1.05e16 / 8e16 for name in ("flops", "tokens")}
    said = open_questions(made_up.results(tmp_path, rows))
    assert any(each.endswith("where no run was fitted: no run has tested it.") for each in said)


def test_the_same_inputs_give_the_same_report(written, tmp_path, monkeypatch):
    folder, paths = written
    text = (folder / "report.md").read_text()
    assert report.text(read_results(folder), FILE, [each.stem for each in paths[1:]]) == text
    assert "megahybrid study fit studies/hybrids-1.yaml" in text
    assert "Code of the runs: 0.1.0 0123456789ab. Data: c0ffee." in text
    monkeypatch.setattr(pictures, "PICTURES", {"branches.png": run_pictures.branches_figure})
    made_up.write(tmp_path)
    (tmp_path / "branches.png").write_bytes(b"of an earlier design")
    assert report.write(tmp_path, FILE) == [tmp_path / "report.md"] and not (tmp_path / "branches.png").exists()


def test_pictures_are_there_and_not_blank(written):
    folder, paths = written
    names = {"isoflop", "compute", "optimum", "multiplier", "prediction", "residuals", "learning_rate", "cost"}
    assert {each.stem for each in paths[1:]} == names
    for path in paths[1:]:
        assert f"]({path.name})" in (folder / "report.md").read_text()
        picture = matplotlib.image.imread(path)
        assert min(picture.shape[:2]) > 400 and (picture[..., :3].min(axis=2) < 0.9).mean() > 0.01


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("runs.csv", None, "has no runs.csv: run `megahybrid study collect`"),
        ("fit.json", None, "has no fit.json with a fitted kind: run `megahybrid study fit`"),
        ("fit.json", '{"kinds": {"gdn', "has no fit.json with a fitted kind"),
        ("fit.json", '{"kinds": {}}', "has no fit.json with a fitted kind"),
        ("fit.json", '{"kinds": {"gdn": {"intervals": {}}}}', "has no intervals: run `megahybrid study fit`"),
        ("runs.csv", ",".join(made_up.COLUMNS) + "\n", "'.*runs.csv' has no runs"),
        ("runs.csv", "parameters,tokens,loss\n1e6,1e8,3\n", "runs.csv and fit.json in '.*hybrids-1' have other kinds"),
        ("runs.csv", "cell,run\na,b\n", "'.*runs.csv' has no column for parameters"),
        ("plan.csv", "cell\na\n", "'.*plan.csv' has no column gpu_hours"),
        ("plan.csv", "cell,gpu_hours,data\na,many,\n", "Run 1 of '.*plan.csv' has gpu_hours = 'many'"),
    ],
)
def test_what_cannot_be_reported_is_one_sentence_and_leaves_nothing(name, content, said, tmp_path):
    folder = made_up.write(tmp_path / "hybrids-1")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=said):
        report.write(folder, FILE)
    assert sorted(folder.iterdir()) == before


def test_a_kind_that_may_never_have_the_loss_is_said_to(tmp_path):
    """fit.json gives multipliers where they are finite in every replicate."""

    def change(made):
        points = made["multipliers"]
        points["transformer vs gdn"] = [each for each in points["transformer vs gdn"] if each["flops"] < 9e15]
        points["transformer vs lalte"] = points["gdn vs lalte"] = []

    results = made_up.results(tmp_path, change=change)
    assert savings(results, 1e16) == [] and [each.kind for each in savings(results, 5e15)] == ["gdn"]
    assert "What lalte needs for the loss of gdn at 1e16 FLOPs: by its law it may never have it." in open_questions(
        results
    )
    for kind in ("gdn", "lalte"):
        said = f"What {kind} needs for the loss of transformer at 1e16 FLOPs: by its law it may never have it."
        assert said in open_questions(results)
    assert pictures.multiplier_figure(results) is not None
    assert "| gdn | transformer | 1e15 | 0.675 " in report.text(results, FILE, [])


def test_noise_is_how_much_seeds_differ(tmp_path):
    """Pooled over budgets, each about its own mean."""
    rows = made_up.runs(noise=0)
    rows.append(made_up.row("gdn", "128x4", 3e15, seed=1, noise=0.1))
    for row, noise in zip(
        (each for each in rows if each["cell"].startswith("gdn-128x4-1e15")), (0, 0.02, 0.04), strict=True
    ):
        row["loss"] *= math.exp(noise)
    text = report.text(made_up.results(tmp_path, rows), FILE, [])
    squares = 0.02**2 * 2 + math.log(1.1) ** 2 / 2
    assert (
        f"| kind | 128x4 |\n| --- | --- |\n| transformer | 0 % |\n| gdn | {100 * (squares / 3) ** 0.5:.2g} % |" in text
    )
    alone = [each for each in made_up.runs() if each["seed"] == 0]
    assert "## Noise" not in report.text(made_up.results(tmp_path, alone), FILE, [])


def test_a_fit_of_other_runs_is_said_first(tmp_path):
    results = made_up.results(tmp_path, change=lambda made: made["kinds"]["gdn"].update(runs=13))
    assert answers(results)[0] == "**The fit of gdn has 13 runs, runs.csv 14**: run `megahybrid study fit` again."


def test_other_ways_to_fit_stand_beside_the_law(written):
    text = (written[0] / "report.md").read_text()
    assert "Approach 2 gives 0.550 for transformer and 0.550 for gdn. It is biased" in text
    assert "at 1e17 FLOPs -2.9 % and -2.9 % off." in text
    assert "| gdn | 0.541 | 0.531 | 0.541 | none | 0.550 | -0.12 %, 3 of 4 inside, from 10 runs |" in text
    assert "| lalte | 0.541 | 0.531 | 0.541 | none | too few sizes | too few runs |" in text
    assert "| gdn, N without embeddings | 14 | 0.561 (0.514 to 0.568) |" in text
    assert "alpha 0.280, beta 0.330, objective 0.0004 instead of 0.00036" in text
    assert "| 8e16 | 2026-01-02T03:00:00+00:00 | 2026-01-02T03:04:05+00:00 | 4.2888 |" in text
    assert "| 4.2888 | 4.2802 to 4.2973 | 0.2 % | 4.2834 | -0.12 % | yes |" in text
    assert "| transformer | 50M | 2B | 7.5e17 | 3.5152 | 3.4941 to 3.5363 |" in text


def test_what_is_no_finite_number_does_not_stop_a_report(tmp_path):
    def change(made):
        law = made["kinds"]["gdn"]
        law["a_opt"], law["intervals"]["a_opt"] = None, [None, None]
        for each in law["optimum"]:
            each |= {"parameters": None, "tokens": None, "loss": None, "interval": [None, None]}

    results = made_up.results(tmp_path, change=change)
    assert "nan (-inf to inf) of gdn" in " ".join(answers(results))
    for make in (pictures.compute_figure, pictures.optimum_figure, pictures.multiplier_figure):
        assert make(results) is not None
    assert "| gdn | 14 | nan (-inf to inf) |" in report.text(results, FILE, [])


def test_an_interval_that_is_open_to_one_side_judges_by_the_other(tmp_path):
    """fit.json and prediction.json say null for infinity."""
    name = made_up.identity("gdn-320x10-8e16-s0")
    for interval, place in (([None, 9.0], "inside"), ([1.0, None], "inside"), ([9.0, None], "outside")):
        results = made_up.results(tmp_path, frozen=lambda made, ends=interval: made[name].update(interval=ends))
        (said,) = [each for each in answers(results) if each.startswith("gdn, 8 times")]
        assert said.endswith(f"{place} the interval.") and "inf" in report.text(results, FILE, [])
        assert pictures.compute_figure(results) and pictures.prediction_figure(results)


def test_an_interval_that_is_open_to_both_sides_is_no_prediction_that_was_right(tmp_path):
    name = made_up.identity("gdn-320x10-8e16-s0")
    before, results = (
        answers(made_up.results(tmp_path, frozen=lambda made, ends=ends: made[name].update(interval=ends)))
        for ends in ([1.0, 9.0], [None, None])
    )
    (said,) = [each for each in results if each.startswith("gdn, 8 times")]
    assert said.endswith("which nothing was said of.")
    right = [int(each[2]) for told in (before, results) for each in told if "frozen predictions were right" in each]
    assert right[1] == right[0] - 1


def test_a_study_whose_hours_nobody_measured_is_reported(tmp_path):
    made_up.write(tmp_path, [row | {"gpu_hours": ""} for row in made_up.runs()])
    (tmp_path / "plan.csv").unlink()
    drawn = report.write(tmp_path, FILE)
    assert tmp_path / "multiplier.png" in drawn and tmp_path / "cost.png" not in drawn
    assert "| not measured |" in (tmp_path / "report.md").read_text()


def test_what_fit_writes_is_what_report_reads(tmp_path, monkeypatch):
    """From runs with a known law: the multiplier is inside its interval, which leaves 1 out."""
    monkeypatch.setattr(pictures, "PICTURES", {})
    made_up.write(tmp_path)
    monkeypatch.setattr(Study, "folder", tmp_path)
    fit(Study(), replicates=100)
    results = read_results(tmp_path)
    assert len(savings(results, 1e16)) == 3
    for saving in savings(results, 1e16):
        assert saving.low < made_up.multiplier(saving.base, saving.kind, 1e16) < saving.high < 1
    text = report.text(results, FILE, [])
    assert "gdn needs 33 % less compute than transformer" in text and "The fit of" not in text
    assert text.count("N without embeddings") == 3 and "Approach 2 gives" in text
