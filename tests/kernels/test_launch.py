"""Launches that ask Triton only once."""

import itertools

import pytest
import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from megahybrid_kernels.launch import Kernel, specialization

INTEGERS = (1, 0, 16, 17, -16, -1, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), 2**63 - 1, 2**63)
MEMORY = torch.zeros(64, dtype=torch.uint8)
TENSORS = [MEMORY[first : first + 8].view(dtype) for dtype in (torch.float16, torch.int16) for first in (0, 16, 2, 8)]


def function(x, y, n, scale, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """Never run."""


@pytest.fixture(scope="module")
def tritons():
    """Triton's own specialization of arguments, for an H100."""
    jit = JITFunction(function)
    bind = create_function_from_signature(jit.signature, jit.params, make_backend(GPUTarget("cuda", 90, 32)))

    def of(args, options):
        _, specialized, others = bind(*args, **options)
        return str(specialized), str(sorted(others.items()))

    return of


def test_equal_where_triton_compiles_the_same(tritons):
    """And seldom else: an alignment or a width that no integer has is not told apart."""
    seen = {}
    others = [{"WIDTH": 16, "DTYPE": tl.int64, "num_warps": 4}, {"WIDTH": 1, "DTYPE": tl.int32, "num_warps": 8}]
    for x, y, n, scale, options in itertools.product(TENSORS, (None, TENSORS[0]), INTEGERS, (0.5, 1.0), others):
        args = (x, y, n, scale)
        seen.setdefault(specialization(args, options), set()).add(tritons(args, options))
    assert all(len(kinds) == 1 for kinds in seen.values())
    kinds = {kind for kinds in seen.values() for kind in kinds}
    assert len(kinds) == len(seen) > 50


@pytest.mark.parametrize("one, other", [(True, 1), (1.0, 1), (None, 0), (16, 32.0)])
def test_types_are_told_apart(one, other):
    assert specialization((MEMORY, one), {}) != specialization((MEMORY, other), {})


def test_options_are_told_apart_by_name():
    assert specialization((), {"A": 1, "B": 2}) != specialization((), {"B": 1, "A": 2})


class Compiled:
    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        return lambda *args: self.log.append((grid, args))


class Jit:
    """As much of a compiler as a launch asks for."""

    arg_names = ("x", "n", "WIDTH", "FLAG")

    def __init__(self):
        self.asked, self.launched = [], []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.asked.append((grid, args, options))
            return Compiled(self.launched)

        return launch


def test_triton_is_asked_once_for_each_kind():
    jit, x = Jit(), TENSORS[0]
    kernel = Kernel(jit, "some")
    for n in (7, 9, 32):
        kernel._launch(0, 5, (x, n), {"FLAG": True, "num_warps": 4, "WIDTH": 16})
    kernel._launch(1, 5, (x, 9), {"FLAG": True, "num_warps": 4, "WIDTH": 16})
    assert [(args[1], options["num_warps"]) for _, args, options in jit.asked] == [(7, 4), (32, 4), (9, 4)]
    # Constants follow in the order of the signature; options of the compiler are none of the kernel's arguments.
    [(grid, (again, *rest))] = jit.launched
    assert grid == (5, 1, 1) and again is x and rest == [9, 16, True]
