"""Where a step's time goes, by kernels' names; and routers that keep a share of the tokens."""

import importlib
import math
import pkgutil
import sys
from pathlib import Path

import pytest
import torch

import megahybrid_kernels
from megahybrid.config.schema import ParallelConfig
from megahybrid.config.validate import keepers
from megahybrid_kernels.launch import Kernel
from tests.model import tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
model_steps = importlib.import_module("model_steps")


def kernels():
    """(op, kernel) of all there are."""
    found = {}
    for each in pkgutil.walk_packages(megahybrid_kernels.__path__, "megahybrid_kernels."):
        for value in vars(importlib.import_module(each.name)).values():
            if isinstance(value, Kernel):
                found[id(value)] = (value.jit.fn.__module__.split(".")[1], value)
    return list(found.values())


def test_every_kernel_has_a_name_of_its_own_and_one_part():
    names = [kernel.name for _, kernel in kernels()]
    assert len(names) == len(set(names)) > 40
    for op, kernel in kernels():
        parts = [model_steps.OPS[prefix] for prefix in model_steps.OPS if kernel.name.startswith(f"{prefix}_")]
        assert parts == [model_steps.OPS[op]] == [model_steps.part_of(kernel.name)], kernel.name


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("flash_fwd_kernel", "attention"),
        ("nvjet_tst_128x256_64x4", "matmul"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4>", "elementwise"),
        ("ncclDevKernel_AllReduce", "other"),
    ],
)
def test_kernels_of_others(kernel, part):
    assert model_steps.part_of(kernel) == part


def test_heads_keep_the_share(workers):
    """To one of four documents' 64 tokens each, of which a window of 7 leaves 58 that a head can lose."""
    ((_, kept),) = workers.run(1, "tests.tools.test_model_steps:biases_that_keep", 0.25, {}, 0.0)
    assert (kept * 58 / 64 / 64 - 0.25).abs().max() < 1.01 / 256


def biases_that_keep(share, parallel, dropout):
    """Those of the routers, by name, and how many tokens a document each head then keeps in a step."""
    from megahybrid.parallel import groups
    from megahybrid.training.engine import Engine
    from megahybrid.training.trial import random_batches
    from tests.training.steps import states

    config = tiny.config("LGL", dropout=dropout, train_cap=True)
    config.train.global_batch_size, config.train.micro_batch_size = 4, 4 // parallel.get("data", 1)
    config.parallel = ParallelConfig(**{key: value for key, value in parallel.items() if key != "data"})
    assert "L" in keepers(config) or not parallel.get("context")
    groups.initialize(config.parallel)
    engine = Engine(config)
    engine.initialize()
    batches = random_batches(config)
    model_steps.keep(engine, batches[0], share)
    biases = {name: bias for name, bias in states(engine)["weights"].items() if name.endswith("projection_bias")}
    engine.step(batches, 1)
    return biases, engine.regulators["L"].kept_now


@pytest.mark.parametrize(
    "parallel",
    [
        {"data": 2},
        {"context": 2},
        {"context": 2, "zero_stage": 3},
        {"context": 2, "tensor": 2, "sequence": True},
    ],
    ids=str,
)
def test_all_layouts_keep_the_same_share_of_tokens(parallel, workers):
    call = "tests.tools.test_model_steps:biases_that_keep", 0.25
    ((expected, kept),) = workers.run(1, *call, {}, 0.2)
    assert len(expected) == 2
    world = math.prod(parallel.get(key, 1) for key in ("data", "context", "tensor"))
    for biases, counts in workers.run(world, *call, parallel, 0.2):
        assert all(torch.equal(biases[name], bias) for name, bias in expected.items())
        assert torch.equal(counts, kept)
