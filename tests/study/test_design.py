"""From a study file to its runs."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megahybrid.config.branching import branch_point
from megahybrid.config.schema import TraceConfig
from megahybrid.errors import UserError
from megahybrid.scaling.flops import flops_per_token
from megahybrid.scaling.hours import tabled
from megahybrid.scaling.parameters import parameter_specs
from megahybrid.study.cells import whole_batch
from megahybrid.study.design import design
from megahybrid.study.file import load_study
from megahybrid.study.identity import identify
from megahybrid.training.optimizer import learning_rate

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
SMALL, LARGE = {"width": 64, "layers": 2}, {"width": 96, "layers": 4}
ONE = {"kinds": {"lalte": "(GL)*{layers/2}"}, "sizes": [SMALL]}
"""One kind, one size: what most tests need."""
BUDGETS = [2e12, 4e12, 8e12]


@pytest.fixture(scope="module")
def study_of(tmp_path_factory):
    """A study by its file, whose keys the arguments replace; None removes one."""
    path = tmp_path_factory.mktemp("study") / "study.yaml"

    def make(**changes):
        tree = {
            "study": "small",
            "base": str(QUICKSTART),
            "kinds": {"transformer": "(F)*{layers}", "lalte": {"pattern": "(GL)*{layers/2}"}},
            "sizes": [SMALL, LARGE],
            "overrides": {"model.intermediate_size": "{3*width}", "model.attention.num_heads": "{width/32}"},
            "budgets": {"flops": BUDGETS},
            "schedule": {"warmup_tokens": 2e4},
        }
        OmegaConf.save(OmegaConf.create({**tree, **changes}), path)
        return load_study(path)

    return make


@pytest.fixture(scope="module")
def cells_of(study_of):
    def cells(tuned=None, **changes):
        return design(study_of(**changes), tuned or {}, needs_data=False)

    return cells


@pytest.fixture(scope="module")
def cells(cells_of):
    return cells_of(hold_out="largest", repeats={"seeds": 2})


def rule(cell, tokens=None):
    """Step Law's rate, by default at the tokens that the cell is asked for."""
    return 1.79 * cell.parameters_without_embedding**-0.713 * (tokens or cell.asked / cell.flops_per_token) ** 0.307


def test_flops_are_those_asked_for_by_the_models_own_count(cells):
    for cell in cells:
        train = cell.config.train
        flops = train.steps * train.global_batch_size * train.seq_length * flops_per_token(cell.config).training
        assert flops == cell.flops == pytest.approx(cell.budget, rel=0.01)
        assert cell.asked == pytest.approx(cell.budget)
        sizes = {name: math.prod(spec.shape) for name, spec in parameter_specs(cell.config).items()}
        assert cell.parameters == sum(sizes.values())
        assert cell.parameters_without_embedding == cell.parameters - sizes["embedding.weight"]


def test_every_kind_has_every_size_at_every_budget_and_the_smallest_again(cells):
    expected = set(itertools.product(("transformer", "lalte"), ("64x2", "96x4"), BUDGETS, (0,)))
    expected |= set(itertools.product(("transformer", "lalte"), ("64x2",), BUDGETS, (1,)))
    assert {(cell.kind, cell.size, cell.budget, cell.seed) for cell in cells} == expected
    assert len({cell.identity for cell in cells}) == len(cells) == len(expected)
    assert {cell.config.train.seed - cell.seed for cell in cells} == {42}
    assert [cell.name for cell in cells if cell.held_out] == ["transformer-96x4-8e12-s0", "lalte-96x4-8e12-s0"]


def test_what_is_held_out_is_not_repeated(cells_of):
    cells = cells_of(**ONE, hold_out="largest", repeats={"seeds": 2, "at": "all"})
    assert [(cell.seed, cell.budget) for cell in cells if cell.held_out] == [(0, 8e12)]
    assert sorted((cell.role, cell.budget) for cell in cells if cell.seed == 1) == [("branch", 2e12), ("trunk", 4e12)]
    rates = {(cell.config.optimizer.learning_rate, cell.config.train.global_batch_size) for cell in cells}
    assert len(rates) == 1, "a repeat differs in its seed alone"


def test_templates_are_filled(cells):
    for cell in cells:
        model, (width, layers) = cell.config.model, map(int, cell.size.split("x"))
        assert (model.hidden_size, model.intermediate_size, model.attention.num_heads) == (width, 3 * width, width / 32)
        assert model.pattern == (f"(F)*{layers}" if cell.kind == "transformer" else f"(GL)*{layers // 2}")


def test_a_branch_is_the_run_from_scratch_up_to_its_step(cells):
    by_identity = {cell.identity: cell for cell in cells}
    trunks = [cell for cell in cells if cell.role == "trunk"]
    assert [trunk.budget for trunk in trunks if trunk.size == "64x2"] == [8e12] * 4
    assert [trunk.budget for trunk in trunks if trunk.size == "96x4"] == [4e12] * 2, "the largest is held out"
    for cell in cells:
        trunk = by_identity[cell.trunk]
        if cell.role == "trunk":
            assert trunk is cell
            assert branch_point(cell.config.train) is None
            continue
        run, step = branch_point(cell.config.train)
        assert (str(run), run.name, step) == (trunk.config.run.dir, trunk.identity, cell.branch_step)
        assert step in trunk.config.checkpoint.milestones
        rates = [
            [learning_rate(each.config.optimizer, at, each.config.train.steps) for at in range(1, step + 2)]
            for each in (cell, trunk)
        ]
        assert rates[0][:-1] == rates[1][:-1]
        begins = cell if cell.budget < trunk.budget else trunk
        assert step == pytest.approx(0.8 * begins.config.train.steps, abs=1)
        assert rates[0][-1] < rates[1][-1] if begins is cell else rates[0][-1] > rates[1][-1]
        same = {"steps", "branch_from"}
        assert {k: v for k, v in vars(cell.config.train).items() if k not in same} == {
            k: v for k, v in vars(trunk.config.train).items() if k not in same
        }


def test_the_rules_are_asked_about_the_geometric_mean_of_a_trunks_tokens(cells):
    family = [cell for cell in cells if (cell.kind, cell.size) == ("transformer", "96x4")]
    tokens = math.prod(cell.asked / cell.flops_per_token for cell in family) ** (1 / 3)
    for cell in family:
        assert cell.config.optimizer.learning_rate == pytest.approx(rule(cell, tokens), rel=1e-3)
        assert cell.config.train.global_batch_size * 512 == pytest.approx(0.58 * tokens**0.571, rel=0.25)
        assert cell.config.optimizer.warmup_steps == round(2e4 / (cell.config.train.global_batch_size * 512))


def test_separate_runs_have_a_rate_each(cells_of):
    cells = cells_of(**ONE, schedule={"kind": "cosine", "warmup_tokens": 2e4})
    assert {cell.role for cell in cells} == {"single"}
    assert {cell.config.optimizer.schedule for cell in cells} == {"cosine"}
    small, _, large = (cell.config.optimizer.learning_rate for cell in cells)
    assert large / small == pytest.approx(4**0.307, rel=1e-3)


def test_ratios_are_the_first_kinds_and_flops_are_matched(cells_of):
    transformer, lalte = cells_of(
        sizes=[LARGE],
        budgets={"tokens_per_parameter": [2]},
        rules={"learning_rate": "olmo_core", "batch": "olmo_core"},
        schedule={},
    )
    assert transformer.tokens == pytest.approx(2 * transformer.parameters, rel=0.01)
    assert lalte.asked == pytest.approx(transformer.asked)
    assert lalte.flops == pytest.approx(transformer.flops, rel=0.01)
    assert transformer.config.optimizer.learning_rate == pytest.approx(
        0.00235 * (transformer.parameters_without_embedding / 108e6) ** (-1 / 3), rel=1e-3
    )


def test_tokens_are_the_first_kinds_at_every_size_and_flops_are_matched(cells_of):
    cells = cells_of(budgets={"tokens": [3e5, 6e5]}, hold_out={"width": 96, "layers": 6, "tokens": 2.4e6})
    expected = itertools.product(("64x2", "96x4"), (3e5, 6e5))
    assert {(cell.size, cell.budget) for cell in cells if not cell.held_out} == set(expected)
    first, second = (
        {(cell.size, cell.budget): cell for cell in cells if cell.kind == kind} for kind in ("transformer", "lalte")
    )
    for place, cell in first.items():
        other = second[place]
        assert cell.asked / cell.flops_per_token == pytest.approx(cell.budget)
        assert other.asked == pytest.approx(cell.asked) and other.flops == pytest.approx(cell.asked, rel=0.01)
    assert [cell.name for cell in cells if cell.held_out] == ["transformer-96x6-2.4e6-s0", "lalte-96x6-2.4e6-s0"]
    largest = cells_of(**ONE, budgets={"tokens": [6e5, 3e5]}, hold_out="largest")
    assert [cell.budget for cell in largest if cell.held_out] == [6e5]


def test_a_size_may_have_budgets_of_its_own(cells_of):
    own = {**LARGE, "budgets": {"tokens_per_parameter": [3, 1]}}
    cells = cells_of(sizes=[SMALL, own], hold_out="largest", repeats={"seeds": 2, "at": "all"})
    budgets = {(cell.kind, cell.size): [] for cell in cells}
    for cell in cells:
        budgets[cell.kind, cell.size].append((cell.seed, cell.role, cell.budget))
    small = [(seed, *each) for seed in (0, 1) for each in (("trunk", 8e12), ("branch", 2e12), ("branch", 4e12))]
    large = [(0, "trunk", 1), (0, "branch", 3), (1, "single", 1)]
    for kind in ("transformer", "lalte"):
        assert (budgets[kind, "64x2"], budgets[kind, "96x4"]) == (small, large)
    # Where all sizes have some, the study needs none.
    every = [{**SMALL, "budgets": {"flops": BUDGETS}}, own]
    assert [cell.name for cell in cells_of(sizes=every, budgets={})] == [
        cell.name for cell in cells_of(sizes=[SMALL, own])
    ]
    assert [cell.name for cell in cells if cell.held_out] == ["transformer-96x4-3-s0", "lalte-96x4-3-s0"]
    for cell in cells:
        if cell.size == "96x4" and cell.kind == "transformer":
            assert cell.tokens == pytest.approx(cell.budget * cell.parameters, rel=0.01)
    first, second = (
        next(cell for cell in cells if cell.kind == kind and cell.budget == 3) for kind in ("transformer", "lalte")
    )
    assert second.asked == pytest.approx(first.asked)


def test_parameters_are_matched_by_the_width_of_the_swiglu(cells_of):
    transformer, lalte = cells_of(sizes=[LARGE], budgets={"flops": [8e12]}, match="parameters")
    assert lalte.parameters == pytest.approx(transformer.parameters, rel=0.01)
    assert lalte.parameters == sum(math.prod(spec.shape) for spec in parameter_specs(lalte.config).values())
    assert lalte.config.model.intermediate_size < transformer.config.model.intermediate_size
    assert lalte.tokens == pytest.approx(transformer.tokens, rel=0.02)


def test_gpu_hours_are_matched(cells_of):
    transformer, lalte = cells_of(sizes=[LARGE], budgets={"flops": [8e12]}, match="gpu_hours")
    first, second = (
        tabled(replace(cell.config, train=replace(cell.config.train, global_batch_size=4, micro_batch_size=4)))
        for cell in (transformer, lalte)
    )
    assert transformer.asked == pytest.approx(8e12)
    assert lalte.tokens * second.step_seconds == pytest.approx(transformer.tokens * first.step_seconds, rel=0.02)


def test_a_size_of_its_own_is_held_out(cells_of):
    own = {**LARGE, "flops": 6.4e13, "overrides": {"train.micro_batch_size": 2}}
    cells = cells_of(**ONE, hold_out=own)
    assert [(cell.name, cell.role) for cell in cells if cell.held_out] == [("lalte-96x4-6.4e13-s0", "single")]
    assert cells[-1].config.train.micro_batch_size <= 2
    assert cells[0].role == "trunk"


def test_the_best_factor_of_the_grid_multiplies_the_other_rates(cells_of):
    changes = {**ONE, "rules": {"tune": {"factors": [0.5, 1]}}}
    cells, tuned = cells_of(**changes), cells_of({"lalte": 0.5}, **changes)
    grid = [cell for cell in cells if cell.role == "tune"]
    assert [cell.budget for cell in grid] == [2e12, 2e12]
    half, whole = (cell.config.optimizer.learning_rate for cell in grid)
    assert (half, whole) == pytest.approx((0.5 * rule(grid[0]), rule(grid[1])), rel=1e-3)
    assert [cell.identity for cell in grid] == [cell.identity for cell in tuned if cell.role == "tune"]
    for cell, after in zip(cells[2:], tuned[2:], strict=True):
        assert (cell.awaits, after.awaits) == ((grid[0].identity, grid[1].identity), ())
        assert after.config.optimizer.learning_rate == pytest.approx(cell.config.optimizer.learning_rate / 2, rel=1e-3)
        assert cell.identity != after.identity


def test_identities_are_of_what_decides_the_result(cells_of):
    changes = {**ONE, "rules": {"learning_rate": "fixed", "batch": "fixed"}}
    first, second = cells_of(**changes), cells_of(**changes, study="other", budgets={"flops": [1e12, *BUDGETS]})
    assert {cell.identity for cell in first} < {cell.identity for cell in second}, "other milestones, same run"
    trunk = first[0].config

    def changed(section: str, **keys):
        return identify(replace(trunk, **{section: replace(getattr(trunk, section), **keys)}), "data")

    same = identify(trunk, "data")
    assert same == changed("run", dir="elsewhere") == changed("tracking", wandb="disabled", group="g")
    assert (
        same == changed("parallel", zero_stage=2) == changed("train", micro_batch_size=1, log_every=3, cuda_graph=True)
    )
    assert same == changed("train", trace=TraceConfig(steps=[3], ranks=[1]))
    assert same == changed("model", pattern="GL") == changed("data", path="elsewhere", workers=3)
    assert same == changed("checkpoint", every=7, milestones=[3]) == changed("evaluate", every=5)
    others = [
        identify(trunk, "other data"),
        changed("optimizer", learning_rate=1e-5),
        changed("optimizer", warmup_steps=1),
        changed("train", seed=1),
        changed("train", steps=5),
        changed("train", dtype="bf16"),
        changed("parallel", gradient_reduction="bf16"),
        changed("train", global_batch_size=8),
        changed("train", validation_samples=3),
        changed("train", branch_from="studies/runs/a@3"),
        changed("train", branch_from="studies/runs/b@3"),
        changed("train", branch_from="studies/runs/b@4"),
        changed("model", init_std=0.3),
        changed("data", document_masking=False),
    ]
    assert len({same, *others}) == 1 + len(others)
    assert changed("train", branch_from="studies/runs/a@3") == changed("train", branch_from="there/a@3")


@pytest.mark.parametrize("replicas", [1, 4])
def test_a_batch_is_round_and_realises_its_tokens(replicas):
    for wanted, tokens in itertools.product((0.3, 1, 1.44, 5.7, 13, 70, 333.3), ([3e5], [4.1e5, 8.2e5], [1e7, 3e9])):
        fitting = {
            batch
            for batch in range(1, 500)
            if (wanted / 1.25 <= batch <= wanted * 1.25 or abs(batch - wanted) < 1)
            and batch % replicas == 0
            and all(abs(round(each / (512 * batch)) * 512 * batch / each - 1) <= 0.01 for each in tokens)
        }
        if fitting:
            assert whole_batch(wanted, replicas, tokens, 512) in fitting
        else:
            with pytest.raises(UserError, match="no batch near"):
                whole_batch(wanted, replicas, tokens, 512)
    assert whole_batch(333.3, 1, [3e9], 512) == 320
    assert whole_batch(52.1, 1, [3e9], 512) == 52


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kinds": {"x": "(GL)*{layers/4}"}}, "x-64x2: 'layers/4' is 0.5 at width 64, layers 2, no whole number"),
        ({"kinds": {"x": "(GL)*{heads}"}}, "'heads' cannot be computed; write width, layers, whole numbers"),
        ({"kinds": {"x": "(GX)*2"}}, "x-64x2: model.pattern '(GX)*2' has the unknown letter 'X'"),
        ({"kinds": {}}, "kinds is empty"),
        ({"kinds": {"a/b": "F"}}, "'a/b' is no name"),
        ({"kinds": {"x": "F", "y": "F"}}, "x-64x2-8e12-s0 and y-64x2-8e12-s0 are the same run"),
        ({"study": "runs"}, "study is 'runs', the folder of all studies' runs"),
        ({"sizes": [3]}, "sizes"),
        ({"sizes": 3}, "sizes is a list"),
        ({"kinds": ["F"]}, "kinds holds named entries"),
        ({"kinds": {"x": 3}}, "kinds"),
        ({"budgets": 3}, "budgets is a section"),
        ({"hold_out": 3}, "hold_out is a section"),
        ({"overrides": [3]}, "overrides"),
        ({"targets": {}}, "targets"),
        ({"rules": {"tune": 5}}, "rules.tune is a section"),
        ({"base": None}, "base"),
        ({"kinds": {"x": "${nothing}"}}, "nothing"),
        ({"noise": "much"}, "noise"),
        ({"sizes": [SMALL, SMALL]}, "sizes has 64x2 twice"),
        ({"sizes": [{"width": 0, "layers": 2}]}, "sizes[0].width is 0; it must be greater than 0"),
        ({"budgets": {"flops": [1e12, 1e12]}}, "budgets has 1000000000000.0 twice"),
        ({"budgets": {}}, "budgets needs one of flops, tokens_per_parameter and tokens"),
        ({"budgets": {"flops": BUDGETS, "tokens": [1e6]}}, "budgets needs one of flops, tokens_per_parameter and"),
        ({"budgets": {"tokens": [1e6, 1e6]}}, "budgets has 1000000.0 twice"),
        ({"budgets": {"tokens": [-1.0]}}, "budgets.tokens is [-1.0]; it must be greater than 0"),
        ({"sizes": [{**SMALL, "budgets": {}}]}, "sizes[0].budgets needs one of flops, tokens_per_parameter and tokens"),
        ({"sizes": [SMALL, {**LARGE, "budgets": {"tokens": [1e6, 1e6]}}]}, "sizes[1].budgets has 1000000.0 twice"),
        ({"sizes": [{**SMALL, "budgets": {"tokens": [-1.0]}}]}, "sizes[0].budgets.tokens is [-1.0]; it must be"),
        ({"budgets": {"flops": [1e8]}}, "Cell lalte-64x2-1e8-s0: no batch near"),
        ({"budgets": {"flops": [-1.0]}}, "budgets.flops is [-1.0]; it must be greater than 0"),
        ({"schedule": {"warmup_tokens": 1e8}}, "lalte-64x2-8e12-s0: its warm-up of"),
        ({"rules": {"learning_rate": "guess"}}, "choose one of step_law, olmo_core, fixed"),
        ({"hold_out": "smallest"}, "hold_out.at is smallest; choose one of largest"),
        ({"hold_out": {"width": 64}}, "hold_out is either largest, or a size and a budget"),
        ({"hold_out": {"at": "largest", "tokens": 1e6}}, "hold_out is either largest, or a size and a budget"),
        ({"hold_out": {**SMALL, "flops": 1e13, "tokens": 1e6}}, "hold_out is either largest, or a size and a budget"),
        ({"overrides": {"train.steps": 5}}, "overrides has train.steps, which the study sets itself"),
        ({"overrides": {"train.resume_from": 5}}, "overrides has train.resume_from, which the study sets itself"),
        (
            {"overrides": {"optimizer.learning_rate": 1e-3}},
            "learning_rate, which rules.learning_rate sets",
        ),
        (
            {"overrides": {"train.global_batch_size": 8}},
            "batch_size, which rules.batch sets",
        ),
        ({"overrides": {"model.gdn.heads": 5}}, "lalte-64x2: Unknown configuration key 'model.gdn.heads'"),
        (
            {"overrides": {"model.attention.head_dim": 30}},
            "lalte-64x2: model.attention.head_dim must be a multiple of 4",
        ),
        ({"budget": 3}, "Unknown configuration key 'budget'; did you mean budgets?"),
        ({"base": "absent.yaml"}, "base: there is no recipe 'absent.yaml'"),
        ({"limits": {"profile": "absent"}}, "There is no profile"),
    ],
)
def test_bad_studies_are_refused_in_one_sentence(cells_of, changes, said):
    with pytest.raises(UserError) as caught:
        cells_of(**{**ONE, **changes})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_data_that_are_not_prepared_are_refused_where_they_are_needed(study_of, tmp_path):
    study = study_of(**ONE, overrides={"data.path": str(tmp_path), "model.attention.num_heads": 2})
    with pytest.raises(UserError, match="holds no prepared data; run `megahybrid prepare"):
        design(study)
