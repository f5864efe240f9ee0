from pathlib import Path

import pytest
import torch.distributed as dist

from megahybrid.config import load_config
from megahybrid.config.pattern import parse_pattern
from megahybrid.config.schema import ParallelConfig
from megahybrid.parallel import groups
from megahybrid.scaling.memory import peak_bytes
from megahybrid.scaling.parameters import parameters_by_rank
from megahybrid.scaling.plan import describe, parameters_by_part

RECIPES = Path(__file__).parents[2] / "recipes"
MODELS = ("lalte", "lansa", "gdn", "gdn-swa", "gdn-full", "transformer", "nsa")


# He & Garner's models in millions of parameters (method: backbone and shapes), and ours.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("gdn-0.4b", 367),
        ("gdn-swa-0.4b", 354),
        ("gdn-full-0.4b", 354),
        ("lalte-0.4b", 360),
        ("lansa-0.4b", 358),
        ("transformer-0.4b", 341),
        ("gdn-1.4b", 1466),
        ("gdn-swa-1.4b", 1340),
        ("gdn-full-1.4b", 1340),
        ("lalte-1.4b", 1343),
        ("lansa-1.4b", 1323),
        ("transformer-1.4b", 1213),
        ("lalte-8b", 8110),
    ],
)
def test_parameter_totals_are_the_papers(name, millions):
    parts = parameters_by_part(load_config(RECIPES / f"{name}.yaml"))
    assert sum(parts.values()) / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize(("length", "said"), [(1024, True), (1025, False), (512, True)])
def test_a_plan_says_what_has_nothing_to_choose(length, said):
    """16 blocks of 64 are 1,024 tokens, of which every query selects all."""
    plan = describe(load_config(RECIPES / "quickstart.yaml", ["model.pattern=GLN", f"train.seq_length={length}"]))
    sentence = "NSA has nothing to choose in training: it begins to after 1,024 tokens of a document, and train."
    assert (sentence in plan) == said and "LTE has" not in plan


def test_a_plan_needs_no_process_groups_and_leaves_none():
    groups.shut_down()
    try:
        config = load_config(RECIPES / "quickstart.yaml")
        without = parameters_by_part(config)
        assert not dist.is_initialized()
    finally:
        groups.initialize(ParallelConfig())
    assert parameters_by_part(config) == without


@pytest.mark.parametrize(("size", "router"), [("0.4b", 518_160), ("1.4b", 259_080)])
def test_router_parameters_are_the_papers(size, router):
    parts = parameters_by_part(load_config(RECIPES / f"lalte-{size}.yaml"))
    assert parts["LTE: router"] == 12 * router


@pytest.mark.parametrize(("size", "tokens_a_step", "tokens"), [("0.4b", 2**19, 10.7e9), ("1.4b", 2**20, 32.2e9)])
@pytest.mark.parametrize("model", MODELS)
def test_recipes_train_on_the_papers_tokens(model, size, tokens_a_step, tokens):
    config = load_config(RECIPES / f"{model}-{size}.yaml")
    train = config.train
    assert len(parse_pattern(config.model.pattern).letters) == 24
    assert train.global_batch_size * train.seq_length == tokens_a_step
    assert tokens_a_step * train.steps == pytest.approx(tokens, rel=0.005)


def test_recipes_of_a_size_differ_in_pattern_and_run_directory_only():
    for size in ("0.4b", "1.4b"):
        configs = [load_config(RECIPES / f"{model}-{size}.yaml", ["model.pattern=G", "run.dir=x"]) for model in MODELS]
        assert all(config == configs[0] for config in configs)


def test_the_8b_model_fits_four_gpus_in_both_of_its_layouts():
    """80 GB are 79.1 GiB; 18 bytes of each of 8.11 B parameters are 136 GiB, 34 on each GPU."""
    split = ["parallel.zero_stage=1", "parallel.tensor=4", "parallel.sequence=true", "train.micro_batch_size=4"]
    for overrides, replicas in ([], 4), ([*split, "train.recompute=none"], 1):
        (peak,) = peak_bytes(load_config(RECIPES / "lalte-8b.yaml", overrides), replicas)
        assert peak / 2**30 == pytest.approx(66, rel=0.02)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_has_a_plan(path):
    config = load_config(path)
    lines = describe(config).splitlines()
    total = sum(parameters_by_part(config).values())
    tokens = config.train.steps * config.train.global_batch_size * config.train.seq_length
    assert any(line.split() == ["total", f"{total:,}"] for line in lines)
    assert any(f"{tokens:,} tokens" in line for line in lines)
    assert max(map(len, lines)) <= 120
    for stage in (1, 2, 3):
        (row,) = (line for line in lines if line.startswith(f"weights, gradients, optimizer: ZeRO {stage}"))
        one, eight, many = (float(word) for word in row.split()[-3:])
        assert one >= eight >= many


def rows_after(text, start):
    lines = text.splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.startswith(start))
    return [line.split() for line in lines[at:]]


def test_columns_are_numbers_of_gpus_and_rows_the_choices_of_recompute():
    config = load_config(RECIPES / "lalte-0.4b.yaml", ["parallel.tensor=2", "train.recompute=L"])
    head, activations, *rest = rows_after(describe(config), "GiB a GPU, by number of GPUs")
    assert head[-3:] == ["2", "16", "128"]
    assert [row[-4] for row in rest[3:]] == [f"train.recompute={choice}" for choice in ("L", "none", "all", "G")]
    for size, states, saved, peak in zip((1, 8, 64), rest[0][-3:], activations[-3:], rest[3][-3:], strict=True):
        assert float(peak) == pytest.approx(peak_bytes(config, size)[0] / 2**30, abs=0.06)
        assert float(states) + float(saved) == pytest.approx(float(peak), abs=0.11)


def test_the_start_is_listed_where_it_needs_most():
    """ZeRO-2 begins with 6 bytes a parameter and 8 by the replicas, where steps need 2, 16 by them, and activations."""
    config = load_config(RECIPES / "lalte-8b.yaml", ["parallel.zero_stage=2", "train.recompute=all"])
    (row,) = (line for line in describe(config).splitlines() if line.startswith("before the first step"))
    (count,) = parameters_by_rank(config)
    expected = [f"{count * (6 + 8 / size) / 2**30:.1f}" for size in (8, 64)]
    assert row.split()[-2:] == expected and len(row.split()) == 10
    assert "before the first step" not in describe(load_config(RECIPES / "lalte-8b.yaml"))


def test_a_pipelines_stages_are_listed():
    overrides = ["parallel.pipeline=3", "parallel.tensor=2", "model.pattern=GL|G|LGL"]
    config = load_config(RECIPES / "lalte-0.4b.yaml", overrides)
    _, *rows = rows_after(describe(config), "pipeline rank  ")
    parameters, peaks = parameters_by_rank(config), peak_bytes(config, 1)
    assert [row[1] for row in rows[:3]] == ["0-1", "2", "3-5"]
    assert sum(float(row[2].rstrip("%")) for row in rows[:3]) == pytest.approx(100, abs=0.2)
    assert [row[3:] for row in rows[:3]] == [
        [f"{count:,}", f"{peak / 2**30:.1f}"] for count, peak in zip(parameters, peaks, strict=True)
    ]
    (worst,) = (row for row in rows if row[:4] == ["pipeline", "rank", "that", "needs"])
    assert worst[5] == str(peaks.index(max(peaks)))
