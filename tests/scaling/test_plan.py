from pathlib import Path

import pytest
import torch.distributed as dist

from megahybrid.config import load_config
from megahybrid.config.pattern import parse_pattern
from megahybrid.config.schema import ParallelConfig
from megahybrid.parallel import groups
from megahybrid.scaling.plan import describe, parameters_by_part

RECIPES = Path(__file__).parents[2] / "recipes"
MODELS = ("lalte", "gdn", "gdn-swa", "gdn-full", "transformer")


# He & Garner's models in millions of parameters (method: backbone and shapes).
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("gdn-0.4b", 367),
        ("gdn-swa-0.4b", 354),
        ("gdn-full-0.4b", 354),
        ("lalte-0.4b", 360),
        ("transformer-0.4b", 341),
        ("gdn-1.4b", 1466),
        ("gdn-swa-1.4b", 1340),
        ("gdn-full-1.4b", 1340),
        ("lalte-1.4b", 1343),
        ("transformer-1.4b", 1213),
    ],
)
def test_parameter_totals_are_the_papers(name, millions):
    parts = parameters_by_part(load_config(RECIPES / f"{name}.yaml"))
    assert sum(parts.values()) / 1e6 == pytest.approx(millions, rel=0.005)


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
