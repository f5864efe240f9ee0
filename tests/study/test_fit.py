"""From tables to fit.json."""

import dataclasses
import functools
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from megahybrid.cli import main
from megahybrid.errors import UserError
from megahybrid.study.file import Study, TargetConfig
from megahybrid.study.fit import _finite, fit, fit_runs
from megahybrid.study.fit_text import describe
from megahybrid.study.kind_fit import column
from megahybrid.study.law.frontier import Frontier, TokenCost, multiplier
from megahybrid.study.table import read_runs
from tests.study import tables

OTHER = dataclasses.replace(tables.LAW, A=430.0, E=1.80)
NOISE = 0.002
TARGET = (3e7, 1e9)


@functools.cache
def _two_kinds():
    """Rows of two kinds whose laws are LAW and OTHER, each with a held-out run ten times as large."""
    rng = np.random.default_rng(3)
    parameters, tokens = tables.isoflop((1e16, 1e17, 1e18), 6)
    found = []
    for kind, law in (("base", tables.LAW), ("other", OTHER)):
        found += tables.rows(kind, law, parameters, tokens, NOISE, rng)
        largest = np.array([[1.2e8], [1.4e10]])
        found += tables.rows(kind, law, *largest, NOISE, rng, cell=f"{kind}-held-out", held_out=1)
    return found


def two_kinds():
    return [dict(row) for row in _two_kinds()]


def study_of(rows, targets=()):
    """A study in the working directory with that runs.csv."""
    study = Study("s", "base.yaml", targets=[TargetConfig(*each) for each in targets])
    study.folder.mkdir(parents=True)
    tables.write(study.folder / "runs.csv", rows)
    return study


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The folder of a study that was fitted, and what came."""
    rows = two_kinds()
    rows.append(rows[0] | {"cell": "gone", "state": "missing", "excluded": "missing", "loss": ""})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("study"))
        return folder / "studies" / "s", fit(study_of(rows, [TARGET]), replicates=400)


def test_fit_json_is_what_is_returned_and_is_strict_json(fitted):
    folder, found = fitted
    text = (folder / "fit.json").read_text()
    assert json.loads(text) == found and "NaN" not in text and "Infinity" not in text
    assert list(folder.glob(".*")) == []


def test_what_is_not_finite_becomes_null():
    made = _finite({"a": [np.float64("inf"), np.array(1.5)], "b": (float("nan"), np.int64(2), "text", None, True)})
    assert made == {"a": [None, 1.5], "b": [None, 2, "text", None, True]}


def test_the_laws_and_their_intervals(fitted):
    kinds = fitted[1]["kinds"]
    assert list(kinds) == ["base", "other"]
    for name, law in (("base", tables.LAW), ("other", OTHER)):
        found, cost = kinds[name], TokenCost()
        assert found["runs"] == 18 and found["gradient_norm"] < 1e-12 and found["condition"] < 1e5
        assert found["alpha"] == pytest.approx(law.alpha, abs=0.06)
        for figure in ("A", "B", "E", "alpha", "beta", "a_opt"):
            low, high = found["intervals"][figure]
            truth = Frontier(law, cost).a_opt if figure == "a_opt" else getattr(law, figure)
            spare = (high - low) / 4  # of twelve intervals one may miss by a little
            assert low < found[figure] < high and low - spare < truth < high + spare
            assert found["delta"]["1e-2"][figure] == pytest.approx(found[figure], rel=0.6)
        for each in found["optimum"]:
            if each["flops"] < 1e19:
                assert each["loss"] == pytest.approx(float(Frontier(law, cost).loss(each["flops"])), rel=0.01)
                assert each["interval"][0] <= each["loss"] <= each["interval"][1]
                assert 6 * each["parameters"] * each["tokens"] == pytest.approx(each["flops"])
        assert found["without_embedding"]["alpha"] == pytest.approx(found["alpha"], rel=1e-6)
        assert found["without_embedding"]["A"] == pytest.approx(found["A"] * 0.9 ** found["alpha"], rel=1e-6)
        assert found["without_embedding"]["predictions"][0]["parameters"] == pytest.approx(0.9 * 1.2e8)


def test_predictions_of_held_out_runs_and_of_targets(fitted):
    found = fitted[1]
    actual = {row["cell"]: row["loss"] for row in two_kinds()}
    for name, law in (("base", tables.LAW), ("other", OTHER)):
        held, target = found["kinds"][name]["predictions"]
        assert (held["cell"], held["parameters"], held["flops"]) == (f"{name}-held-out", 1.2e8, 6 * 1.2e8 * 1.4e10)
        assert held["actual"] == actual[f"{name}-held-out"] and held["covered"]
        assert held["error"] == held["actual"] / held["loss"] - 1
        assert (target["cell"], target["actual"], target["covered"]) == (None, None, None)
        assert target["flops"] == pytest.approx(6 * TARGET[0] * TARGET[1])
        assert target["loss"] == pytest.approx(law.loss(*TARGET), rel=0.01)
        assert target["interval"][0] < law.loss(*TARGET) < target["interval"][1]
        assert 2 * NOISE < target["interval"][1] / target["interval"][0] - 1 < 0.03


def test_targets_and_noise_are_those_of_the_file_that_is_given(tmp_path, monkeypatch, capsys):
    """Not those of the copy beside the table, as it was planned."""
    monkeypatch.chdir(tmp_path)
    rows = ruined(lambda rows: rows)
    for noise, place in ((1e-4, Path("now.yaml")), (0.1, study_of(rows).folder / "study.yaml")):
        place.write_text(
            f"study: s\nbase: now.yaml\nkinds: {{gdn: G}}\nsizes: [{{width: 64, layers: 2}}]\nnoise: {noise}\n"
            f"budgets: {{flops: [1.0e16]}}\ntargets: [{{parameters: {noise * 1e10}, tokens: 1e9}}]\n"
        )
    assert main(["study", "fit", "now.yaml", "--bootstrap", "100"]) == 0
    found = json.loads(Path("studies/s/fit.json").read_text())
    assert [each["parameters"] for each in found["kinds"]["gdn"]["predictions"]] == [1e6]
    assert any("far more than the noise of 0.01 %" in each for each in found["warnings"])


def test_multipliers_of_pairs(fitted):
    found = fitted[1]["multipliers"]
    assert list(found) == ["base vs other"]
    laws = [Frontier(law, TokenCost()) for law in (tables.LAW, OTHER)]
    near = [each for each in found["base vs other"] if each["flops"] < 1e19]
    assert len(near) >= 8
    for each in near:
        low, high = each["interval"]
        assert low < multiplier(*laws, each["flops"]) < high and low < each["multiplier"] < high
    assert near[-1]["multiplier"] == pytest.approx(float(multiplier(*laws, near[-1]["flops"])), rel=0.1)


def test_cross_checks_and_what_was_left_out(fitted):
    found = fitted[1]
    assert found["rule"] == "36 of 39 runs are fitted; left out: 2 held out, 1 missing."
    assert found["warnings"] == ["The fit lacks gone, which has no loss."]
    shared = found["shared_exponents"]
    assert shared["objective"] >= shared["objective_of_own_exponents"] and set(shared["kinds"]) == {"base", "other"}
    assert shared["alpha"] == pytest.approx(tables.LAW.alpha, abs=0.04)
    for name in ("base", "other"):
        check = found["approach2"][name]
        assert check["a_opt"] == pytest.approx(found["kinds"][name]["a_opt"], abs=0.1)
        assert 0.001 < abs(check["bias"]["tokens"]) < 0.1
        step = found["rollout"][name][-1]
        assert step["fitted"] == 12 and step["predicted"] == 6 and abs(step["error"]) < 0.01
        assert step["covered"] >= 5
    text = describe(found)
    for part in (
        "biased even without noise",
        "Warning: The fit lacks gone",
        "base vs other",
        "base-held-out: loss",
        ", inside)",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) < 160


def test_a_second_try_is_named_and_its_first_is_not_called_missing(tmp_path):
    rows = [row | {"run": row["cell"], "retry_of": ""} for row in tables.rows("gdn", tables.LAW, *tables.ladder())]
    for place in (3, 5):
        rows[place] |= {"state": "diverged", "excluded": "diverged: its final loss is nan"}
    rows.append(rows[3] | {"cell": "again", "run": "again", "retry_of": "gdn-3", "state": "done", "excluded": ""})
    found = fit_runs(read_runs(tables.write(tmp_path / "runs.csv", rows)), replicates=0)
    assert found["rule"] == ("11 of 13 runs are fitted; left out: 2 diverged. again is gdn-3 again at half the rate.")
    assert found["warnings"][0] == "The fit lacks gdn-5, which has no loss."


def test_what_all_kinds_say_of_trunks_counts_without_embeddings_too(tmp_path):
    """All models have as large a part without them, which moves A alone."""
    rng, rows = np.random.default_rng(3), []
    for kind, law in (("base", tables.LAW), ("other", OTHER)):
        parameters, tokens = tables.ladder()
        trunks = np.unique(parameters, return_inverse=True)[1]
        made = tables.rows(kind, law, parameters, tokens)
        losses = tables.noisy(law, parameters, tokens, NOISE, rng, trunks, 0.9)
        rows += [
            row | {"trunk": f"{kind}-{trunk}", "loss": loss}
            for row, trunk, loss in zip(made, trunks, losses, strict=True)
        ]
    found = fit_runs(read_runs(tables.write(tmp_path / "runs.csv", rows)), replicates=200)["kinds"]["base"]
    assert found["without_embedding"]["intervals"]["beta"] == pytest.approx(found["intervals"]["beta"], rel=1e-4)


def test_held_out_runs_change_nothing_and_are_predicted_before_they_are_done(fitted, tmp_path):
    """The prediction is frozen before the run starts."""
    rows = two_kinds()
    for row in rows:
        if row["held_out"]:
            row |= {"state": "waiting", "excluded": "waiting", "loss": ""}
    before = fit_runs(read_runs(tables.write(tmp_path / "runs.csv", rows)), replicates=400)
    for name, found in fitted[1]["kinds"].items():
        frozen, now = before["kinds"][name]["predictions"][0], found["predictions"][0]
        assert frozen["actual"] is None and frozen["covered"] is None
        assert (frozen["loss"], frozen["interval"]) == (now["loss"], now["interval"])


def ruined(change):
    """Rows of one kind, changed; each gives the rows that are left."""
    parameters, tokens = tables.ladder()
    return change(tables.rows("gdn", tables.LAW, parameters, tokens, NOISE))


def one_ratio(_):
    sizes = np.geomspace(1e6, 1e8, 12)
    return tables.rows("gdn", tables.LAW, sizes, 20 * sizes * np.linspace(0.99, 1.01, 12), NOISE)


def one_size(_):
    tokens = np.geomspace(1e8, 1e10, 12)
    return tables.rows("gdn", tables.LAW, np.full(12, 1e6), tokens, NOISE)


def rising(rows):
    return [row | {"loss": 1 + (row["parameters"] / 1e6) ** 0.1 + (row["tokens"] / 1e8) ** 0.1} for row in rows]


REFUSED = {
    "too few": (lambda rows: rows[:6], "gdn has 6 runs to fit, and the law needs 7"),
    "all failed": (lambda rows: [row | {"state": "failed", "loss": ""} for row in rows], "gdn has 0 runs to fit"),
    "one ratio": (one_ratio, "about 20 tokens a parameter"),
    "one size": (one_size, "cannot tell the law's terms apart|cannot be fitted"),
    "rising": (rising, "gdn cannot be fitted: no law"),
    "same": (lambda rows: [row | {"loss": 3.0} for row in rows], "cannot tell|cannot be fitted"),
    "not a number": (lambda rows: [*rows[:-1], rows[-1] | {"loss": "nan"}], "Run 12 .* must be a finite number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fitted_is_refused_in_a_sentence_and_nothing_written(tmp_path, monkeypatch, capsys, name):
    change, said = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    study = study_of(ruined(change))
    with pytest.raises(UserError, match=said):
        fit(study)
    assert main(["study", "fit", "--runs", "studies/s/runs.csv", "--bootstrap", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [each.name for each in study.folder.iterdir()] == ["runs.csv"]


def test_every_kind_that_cannot_be_fitted_is_named_and_those_that_can(tmp_path):
    rows = [row | {"loss": 3.0} if row["kind"] == "base" else row for row in two_kinds()]
    rows += [row | {"kind": "third", "cell": f"third-{place}"} for place, row in enumerate(rows[:3])]
    with pytest.raises(UserError) as refusal:
        fit_runs(read_runs(tables.write(tmp_path / "runs.csv", rows)), replicates=0)
    for said in ("runs of base cannot tell the law's terms apart", "third has 3 runs to fit", "(other can be fitted.)"):
        assert said in str(refusal.value)


@pytest.mark.parametrize(
    "arguments",
    [["--runs", "none.csv"], ["s.yaml", "--drop-largest-losses", "2"], ["--runs", "none.csv", "--bootstrap", "7"]],
)
def test_bad_arguments_are_refused(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert main(["study", "fit", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_broken_law_is_warned_of(tmp_path):
    def worse(rows):
        for row in rows:
            short = tables.LAW.loss(row["parameters"], min(row["tokens"], 1e8))
            row["loss"] *= short / tables.LAW.loss(row["parameters"], row["tokens"])
        return rows

    def warnings(change):
        return fit_runs(read_runs(tables.write(tmp_path / "runs.csv", ruined(change))), replicates=0)["warnings"]

    assert any("law" in each for each in warnings(worse)) and warnings(lambda rows: rows) == []


def test_without_a_bootstrap_there_are_no_intervals(tmp_path):
    found = fit_runs(read_runs(tables.write(tmp_path / "runs.csv", two_kinds())), replicates=0)
    assert found["kinds"]["base"]["intervals"] == {}
    assert found["kinds"]["base"]["predictions"][0]["interval"] is None
    assert "None" not in describe(found) and "nan" not in describe(found)


def epoch():
    """The table of Besiroglu et al. 2024 (arXiv 2404.10102), which is not part of the project."""
    folder = os.environ.get("MEGAHYBRID_SCALING_DATA")
    if not folder:
        pytest.skip("MEGAHYBRID_SCALING_DATA names no folder with chinchilla_epoch.csv")
    return Path(folder) / "chinchilla_epoch.csv"


COLUMNS = {"parameters": "Model Size", "flops": "Training FLOP", "loss": "loss"}
REPLICATION = {"A": (477.8, 1), "B": (2143, 5), "E": (1.8172, 2e-4), "alpha": (0.3473, 3e-4), "beta": (0.3672, 3e-4)}


def test_a_published_table_without_its_five_largest_losses():
    """The first acceptance test of scaling studies."""
    runs, began = read_runs(epoch(), COLUMNS, 5), time.process_time()
    found = fit_runs(runs, replicates=0)
    assert time.process_time() - began < 1
    law = found["kinds"]["all"]
    assert law["runs"] == 240 and law["objective"] <= 1.01828e-3 and law["gradient_norm"] < 1e-13
    for name, (value, within) in REPLICATION.items():
        assert law[name] == pytest.approx(value, abs=within)
    assert law["a_opt"] == pytest.approx(0.514, abs=0.003)
    assert not any("hangs on" in each for each in found["warnings"])


def test_standard_errors_of_a_published_table():
    from megahybrid.study.law.bootstrap import bootstrap
    from megahybrid.study.law.fit import Points
    from megahybrid.study.law.fit import fit as fit_law

    runs = [run for run in read_runs(epoch(), COLUMNS, 5) if run.fitted]
    points = Points(*(column(runs, each) for each in ("parameters", "tokens", "loss")))
    law = bootstrap(fit_law(points), [run.trunk for run in runs], 1000, np.random.default_rng(0)).law
    assert law.alpha.std() == pytest.approx(0.015, abs=0.002)
    assert law.beta.std() == pytest.approx(0.021, abs=0.002)


def test_influence_in_a_published_table_with_all_its_runs(tmp_path, capsys):
    path = tmp_path / "runs.csv"
    path.write_bytes(epoch().read_bytes())
    columns = ",".join(f"{ours}={theirs}" for ours, theirs in COLUMNS.items())
    assert main(["study", "fit", "--runs", str(path), "--columns", columns, "--bootstrap", "0"]) in (0, None)
    found = json.loads((tmp_path / "runs.fit.json").read_text())
    assert found["kinds"]["all"]["beta"] == pytest.approx(0.453, abs=5e-4)
    assert any("5 largest losses: without them beta is 0.367, not 0.453" in each for each in found["warnings"])
    assert "hangs on its 5 largest" in capsys.readouterr().out
