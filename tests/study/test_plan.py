"""What `study plan` says of runs, costs and predictions."""

import csv
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from megahybrid import cli
from megahybrid.data.lengths import sequence_lengths
from megahybrid.scaling.flops import flops_per_token
from megahybrid.scaling.hours import Estimate, own_steps, tabled
from megahybrid.scaling.memory import peak_bytes
from megahybrid.study.describe import describe, short
from megahybrid.study.design import design
from megahybrid.study.file import load_study
from megahybrid.study.plan import make_plan

RECIPES = Path(__file__).parents[2] / "recipes"
STUDIES = sorted((RECIPES / "studies").glob("*.yaml"))
STUDY = f"""
study: trial
base: {RECIPES / "quickstart.yaml"}
kinds: {{transformer: "(F)*{{layers}}", gdn: "(G)*{{layers}}"}}
sizes: [{{width: 64, layers: 2}}, {{width: 96, layers: 2}}, {{width: 128, layers: 2}}]
budgets: {{flops: [2.0e12, 4.0e12, 8.0e12]}}
schedule: {{warmup_tokens: 2.0e4}}
hold_out: largest
targets: [{{parameters: 1.0e7, tokens: 2.0e8}}]
"""


@pytest.fixture
def planned(tmp_path, monkeypatch, capsys):
    """Exit code, what is printed, and the study's folder, of a file with some more lines."""
    monkeypatch.chdir(tmp_path)

    def plan(*lines: str):
        kept = [line for line in STUDY.splitlines() if not any(line.startswith(each.split(":")[0]) for each in lines)]
        Path("study.yaml").write_text("\n".join([*kept, *lines]))
        code = cli.main(["study", "plan", "study.yaml"])
        return code, capsys.readouterr(), Path("studies/trial")

    return plan


def test_a_plan_is_a_row_a_run_and_what_they_cost(planned):
    code, printed, folder = planned()
    assert code == 0
    assert (folder / "study.yaml").read_text() == Path("study.yaml").read_text()
    cells = design(load_study("study.yaml"), needs_data=False)
    with open(folder / "plan.csv") as file:
        rows = {row["cell"]: row for row in csv.DictReader(file)}
    assert list(rows) == [cell.name for cell in cells]
    for cell in cells:
        row, train = rows[cell.name], cell.config.train
        assert float(row["flops_asked"]) == pytest.approx(cell.budget)
        assert float(row["difference"]) == pytest.approx(cell.flops / cell.budget - 1, abs=1e-9)
        assert float(row["memory_gib"]) == pytest.approx(peak_bytes(cell.config, 1)[0] / 2**30)
        own = train.steps - (cell.branch_step or 0)
        step = tabled(cell.config).step_seconds
        assert float(row["gpu_hours"]) == pytest.approx((own * step + 4) / 3600)
        assert float(row["gpu_hours_from_scratch"]) == pytest.approx((train.steps * step + 4) / 3600)
        assert int(row["batch_tokens"]) * int(row["steps"]) == int(row["tokens"]) == cell.tokens
        rate = 1.79 * cell.parameters_without_embedding**-0.713 * cell.tokens**0.307
        assert float(row["learning_rate_by_optimum"]) == pytest.approx(cell.config.optimizer.learning_rate / rate)
        assert float(row["batch_by_optimum"]) == pytest.approx(float(row["batch_tokens"]) / (0.58 * cell.tokens**0.571))
        (line,) = (line for line in printed.out.splitlines() if line.startswith(f"{cell.name} "))
        assert line.split()[-1] == f"{float(row['gpu_hours']):,.3g}"
    trained = sum(
        (cell.config.train.steps - (cell.branch_step or 0)) * cell.config.train.global_batch_size * 512
        for cell in cells
    )
    hours = [sum(float(row[name]) for row in rows.values()) for name in ("gpu_hours", "gpu_hours_from_scratch")]
    assert f"18 runs: {trained / 1e6:.3g}M tokens, " in printed.out
    assert f"separate runs would take {hours[1]:,.3g} GPU hours: branching off saves {1 - hours[0] / hours[1]:.0%}" in (
        printed.out
    )
    assert max(len(line.replace(str(RECIPES), "recipes")) for line in printed.out.splitlines()) <= 120
    assert "data: not prepared yet" in printed.out
    near = "the FLOPs of the largest run that is fitted: too near to test the law; hold out one of 4 times\n"
    assert f"held out: 1.0 times {near}" in printed.out
    sizes = [cell.parameters_without_embedding for cell in cells]
    far = "  step_law is of models of 60M to 1B parameters without embeddings: a guess for"
    assert f"{far} {short(min(sizes))} to {short(max(sizes))}\n" in printed.out


def test_a_plan_says_nothing_of_what_is_near_a_rules_models_and_far_from_the_fitted_runs(planned):
    said = planned(
        "hold_out: {width: 128, layers: 2, flops: 3.2e13}", "rules: {learning_rate: fixed, batch: olmo_core}"
    )[1].out
    assert "held out: 4.0 times the FLOPs of the largest run that is fitted\n" in said
    assert "fixed is" not in said and "olmo_core is of models of 5M to 901M parameters" in said


def test_a_plan_says_how_well_kinds_will_be_predicted_and_told_apart(planned):
    lines = planned()[1].out.splitlines()
    widths = {
        name: [float(word.rstrip("%")) for word in line.split()[-2:]]
        for name, line in itertools.product(("transformer", "gdn", "gdn - transformer"), lines)
        if line.startswith(f"{name}  ") and "%" in line and "x" not in line.split()[1]
    }
    for alone, other, both in zip(*(widths[name] for name in ("transformer", "gdn", "gdn - transformer")), strict=True):
        assert both == pytest.approx((alone**2 + other**2) ** 0.5, abs=0.02)
    assert widths["transformer"][0] > widths["transformer"][1] > 100 * 1.96 * 0.003, "what is held out is nearer"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("limits: {gpu_hours: 0.01}", "GPU hours, more than limits.gpu_hours (0.01)"),
        (
            "budgets: {tokens_per_parameter: [1]}\nhold_out: null",
            "transformer: all its runs have about 1 tokens a parameter, one ratio only",
        ),
        (
            "sizes: [{width: 64, layers: 2}]\nbudgets: {flops: [1e12, 2e12, 3e12, 4e12, 5e12, 6e12, 7e12, 8e12]}",
            "transformer: all its runs have one size",
        ),
        ("budgets: {flops: [2.0e12, 8.0e12]}", "transformer: it has 5 runs to fit the law to, which needs 7"),
    ],
)
def test_a_study_that_tells_nothing_or_costs_too_much_is_refused(planned, line, said):
    code, printed, folder = planned(*line.splitlines())
    assert code == 2
    assert said in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not folder.exists()


def test_a_plan_says_how_many_runs_a_gpu_takes_side_by_side(planned, monkeypatch):
    assert "hold all runs side by side" in planned()[1].out
    cells = design(load_study("study.yaml"), needs_data=False)
    largest = sorted((peak_bytes(cell.config, 1)[0] + 2**29 for cell in cells), reverse=True)
    for room, said in ((2**29, "hold no run"), (sum(largest[:5]), "hold the 5 largest"), (sum(largest[:5]) - 1, "4 l")):
        monkeypatch.setattr("megahybrid.study.describe.CLUSTER", SimpleNamespace(memory=room))
        assert said in next(line for line in planned()[1].out.splitlines() if line.startswith("memory: "))


def test_what_is_given_up_is_planned_no_more(planned):
    """Nor is it counted among what tells the law's terms apart, or what is predicted."""
    before = planned()[1].out
    code, printed, folder = planned("give_up: [gdn-64x2-2e12-s0, transformer-128x2-8e12-s0, gdn-128x2-8e12-s0]")
    assert code == 0 and "18 runs: " in before and "15 runs: " in printed.out
    assert "held out: " in before and "held out: " not in printed.out
    with open(folder / "plan.csv") as file:
        assert "gdn-64x2-2e12-s0" not in {row["cell"] for row in csv.DictReader(file)}
    planned("give_up: [gdn-64x2-8e12-s0]")
    with open(folder / "plan.csv") as file:
        hours = {row["cell"]: (row["gpu_hours"], row["gpu_hours_from_scratch"]) for row in csv.DictReader(file)}
    orphan, branch = hours["gdn-64x2-2e12-s0"], hours["transformer-64x2-2e12-s0"]
    assert orphan[0] == orphan[1] and float(branch[0]) < float(branch[1]), "without its trunk from scratch"
    code, printed, _ = planned("give_up: [gdn-64x2-2e12-s0, gdn-64x2-4e12-s0]")
    assert code == 2 and "gdn: it has 6 runs to fit the law to, which needs 7" in printed.err


def test_a_study_may_predict_nothing(planned):
    code, printed, _ = planned("hold_out: null", "targets: []")
    (line,) = [line for line in printed.out.splitlines() if line.startswith("gdn - transformer")]
    assert code == 0 and len(line.split()) == 4, "a_opt alone"


def test_flops_are_counted_at_the_lengths_of_the_data(planned, monkeypatch):
    """Of two samples one is one document, the other eight: full attention costs less, and a recurrence as much."""
    lengths = {512: 0.5, 64: 0.5}
    before = planned()[1].out
    alone = {cell.name: cell for cell in design(load_study("study.yaml"), needs_data=False)}
    assert "FLOPs: samples of 512 tokens are counted as one document each, since no data are at hand here" in before
    for where in ("models", "describe"):
        monkeypatch.setattr(f"megahybrid.study.{where}.sequence_lengths", lambda config: lengths)
    assert "samples of 512 tokens see as much as in sequences of 288 on average" in planned()[1].out
    for cell in design(load_study("study.yaml"), needs_data=False):
        model, train = cell.config.model, cell.config.train
        heads = model.attention.num_heads * model.attention.head_dim
        shorter = 512 / 2 - (512 + 64) / 4  # keys that a query sees on average
        saved = 3 * model.pattern.count("F") * 2 * 4 * heads * shorter
        was = alone[cell.name].flops_per_token
        assert cell.flops_per_token == pytest.approx(was - saved, rel=1e-9)
        assert (cell.tokens > 1.01 * alone[cell.name].tokens) == (cell.kind == "transformer")
        assert train.steps * train.global_batch_size * 512 * cell.flops_per_token == pytest.approx(
            cell.budget, rel=0.01
        )


def test_every_model_is_timed_once_for_each_batch(planned):
    planned()
    asked = []

    def estimate(config):
        asked.append((config.model.pattern, config.model.hidden_size, config.train.global_batch_size))
        return Estimate("H100", 36.0, own_steps(config), "a test")

    plan = make_plan(load_study("study.yaml"), estimate)
    assert len(set(asked)) == len(asked) == 6
    for row in plan.rows:
        own = row.cell.config.train.steps - (row.cell.branch_step or 0)
        assert row.estimate.hours == pytest.approx(0.01 * own + 4 / 3600)
    assert "GPU hours on one H100: a test" in describe(plan)


def test_every_study_but_that_of_repeated_data_predicts():
    assert [path.stem for path in STUDIES if load_study(path).hold_out is None] == ["repeated"]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_recipes_realise_their_budgets(path, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    study = load_study(path)
    cells = design(study, needs_data=False)
    for cell in cells:
        assert cell.flops == pytest.approx(cell.asked, rel=0.01)
        assert cell.flops == flops_per_token(cell.config, sequence_lengths(cell.config)).training * cell.tokens
    for kind in {cell.kind for cell in cells}:
        held, fitted = ([cell for cell in cells if cell.kind == kind and cell.held_out is out] for out in (True, False))
        assert len(held) == (study.hold_out is not None)
        if held:
            assert held[0].flops >= 0.99 * max(cell.flops for cell in fitted)


@pytest.mark.parametrize(
    ("budgets", "barely"), [("[2.0e12, 2.1e12, 2.2e12]", True), ("[2.0e12, 4.0e12, 8.0e12]", False)]
)
def test_runs_that_barely_tell_the_laws_terms_apart_are_remarked(planned, budgets, barely):
    code, printed, _ = planned(f"budgets: {{flops: {budgets}}}")
    assert code == 0 and "refuses above 1e+10" in printed.out
    assert ("the runs of gdn barely tell the law's terms apart" in printed.out) == barely


@pytest.mark.parametrize("block, said", [(30, True), (1_000_000, False), (20, False)])
def test_a_run_that_is_shorter_than_some_shuffled_blocks_is_remarked(make_study, block, said):
    """Its data are those of half a shard, not all; not where a block holds all data."""
    overrides = f"overrides: {{train.global_batch_size: 2, data.shuffle_block_size: {block}}}"
    plan = make_plan(
        make_study(overrides, "sizes: [{width: 32, layers: 1}, {width: 32, layers: 2}, {width: 48, layers: 2}]")
    )
    assert 80 < min(row.cell.tokens for row in plan.rows) / 64 < 120  # samples of 390
    assert ("set data.shuffle_block_size to all" in describe(plan)) == said
