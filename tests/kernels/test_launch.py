"""Launches that ask Triton only once."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import triton.language as tl
from triton import knobs

from megahybrid_kernels import launch as module
from megahybrid_kernels.launch import Kernel, specialization
from tests.doctor.launched import tritons_own

INTEGERS = (1, 0, 16, 17, -16, -1, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), 2**63 - 1, 2**63)
MEMORY = torch.zeros(64, dtype=torch.uint8)
TENSORS = [MEMORY[first : first + 8].view(dtype) for dtype in (torch.float16, torch.int16) for first in (0, 16, 2, 8)]


def function(x, y, n, scale, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """Never run."""


def test_equal_where_triton_compiles_the_same():
    """And seldom else: an alignment or a width that no integer has is not told apart."""
    seen, tritons = {}, tritons_own(function)
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
    params = tuple(SimpleNamespace(is_constexpr=name.isupper()) for name in arg_names)

    def __init__(self):
        self.asked, self.launched = [], []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.asked.append((args[1], options["num_warps"]))
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
    assert kernel.jit.asked == [(7, 4), (32, 4), (11, 4)]
    # Constants follow in the order of the signature; options of the compiler are none of the kernel's arguments.
    places = [(*given[:9], given[10:]) for given in kernel.jit.launched]
    assert all(given[9] is TENSORS[0] for given in kernel.jit.launched)
    assert places == [
        (5, 1, 1, 100, 7, 8, None, None, None, (9, 16, True)),
        (5, 1, 1, 101, 7, 8, None, None, None, (13, 16, True)),
    ]


def test_constants_by_place_are_refused(kernel):
    """Their values would not be told apart."""
    with pytest.raises(TypeError, match="some has 2 arguments that are no constants, but 3 came by place"):
        kernel._launch(0, 5, (TENSORS[0], 7, 16), {"FLAG": True, "num_warps": 4})
    assert not kernel.jit.asked


def test_triton_launches_what_a_profiler_watches(kernel):
    knobs.runtime.launch_enter_hook.add(print)
    try:
        launch(kernel, 7)
        launch(kernel, 7)
    finally:
        knobs.runtime.launch_enter_hook.remove(print)
    launch(kernel, 7)
    launch(kernel, 7)
    assert len(kernel.jit.asked) == 3 and len(kernel.jit.launched) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_process_launches_many_shapes():
    """Whose integers are of one kind: widths and rows far apart, one after the other and again."""
    from megahybrid_kernels import Sequences, causal_conv1d, rms_norm

    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", requires_grad=True)

    for width, spread in [(32, 64), (32, 256), (128, 256), (16, 48), (256, 512)] * 2:
        x, weight, taps = random(70, spread), random(width), random(width, 4)
        sequences = Sequences.of((50, 20), "cuda")
        results = []
        for dtype in (torch.float32, torch.float64):  # kernels; PyTorch
            leaves = [each.detach().to(dtype).requires_grad_() for each in (x, weight, taps)]
            y, _ = causal_conv1d(leaves[0][:, :width], leaves[2], sequences)
            z = rms_norm(leaves[0][:, :width], leaves[1], 1e-6)
            results.append([y, z, *torch.autograd.grad(y.square().sum() + z.sum(), leaves)])
        for ours, exact in zip(*results, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
