"""Launches that ask Triton only once."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from megahybrid_kernels import launch as module
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


class Jit:
    """As much of a compiler as a launch asks for."""

    arg_names = ("x", "n", "WIDTH", "FLAG")

    def __init__(self):
        self.asked, self.launched = [], []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.asked.append((*args, options["num_warps"]))
            return SimpleNamespace(run=lambda *given: self.launched.append(given), function=7, packed_metadata=8)

        return launch


def launch(kernel, n, device=0):
    kernel._launch(device, 5, (TENSORS[0], n), {"FLAG": True, "num_warps": 4, "WIDTH": 16})


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda x: 100 + x)))
    return Kernel(Jit(), "some")


def test_triton_is_asked_once_for_each_kind(kernel):
    for n in (7, 9, 32):
        launch(kernel, n)
    launch(kernel, 11, device=1)
    launch(kernel, 13, device=1)
    assert [(n, warps) for _, n, warps in kernel.jit.asked] == [(7, 4), (32, 4), (11, 4)]
    # Constants follow in the order of the signature; options of the compiler are none of the kernel's arguments.
    places = [(*given[:9], given[10:]) for given in kernel.jit.launched]
    assert all(given[9] is TENSORS[0] for given in kernel.jit.launched)
    assert places == [
        (5, 1, 1, 100, 7, 8, None, None, None, (9, 16, True)),
        (5, 1, 1, 101, 7, 8, None, None, None, (13, 16, True)),
    ]


def test_triton_launches_what_a_profiler_watches(kernel):
    launch(kernel, 7)
    knobs.runtime.launch_enter_hook.add(print)
    try:
        launch(kernel, 7)
    finally:
        knobs.runtime.launch_enter_hook.remove(print)
    assert len(kernel.jit.asked) == 2 and not kernel.jit.launched
