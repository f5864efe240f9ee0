"""Where a step's time goes, by kernels' names."""

import importlib
import pkgutil
import sys
from pathlib import Path

import pytest

import megahybrid_kernels
from megahybrid_kernels.launch import Kernel

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
