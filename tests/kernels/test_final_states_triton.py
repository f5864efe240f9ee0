"""Ops whose last state nobody asks for: the same outputs and gradients, and no memory for states of many documents."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megahybrid_kernels import Sequences
from megahybrid_kernels.causal_conv1d import reference as conv_reference
from megahybrid_kernels.causal_conv1d import triton as conv
from megahybrid_kernels.gated_delta_rule import reference as delta_reference
from megahybrid_kernels.gated_delta_rule import triton as gdn
from megahybrid_kernels.launch import Kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (3, 70)
WHOLE = replace(gdn.tuning(16, torch.float32, torch.device(DEVICE)), programs=0)
CUT = replace(WHOLE, programs=10**6, shortest=1, whole=0, chunk=32)


def delta_inputs(tokens: int, heads: int, dim: int, **options) -> list[torch.Tensor]:
    """q, k, v, a, b, A_log, dt_bias."""
    shapes = [(tokens, heads, dim)] * 3 + [(tokens, heads)] * 2 + [(heads,)] * 2
    return [torch.randn(shape, **options) for shape in shapes]


def conv_inputs(tokens: int, channels: int, **options) -> list[torch.Tensor]:
    """x, weight."""
    return [torch.randn(shape, **options) for shape in ((tokens, channels), (channels, 4))]


def delta(tune: gdn.Tuning):
    return lambda *x, **flag: gdn.gated_delta_rule(*x, tune=tune, **flag)


SMALL_DELTA, SMALL_CONV = (delta_inputs, sum(LENGTHS), 1, 16), (conv_inputs, sum(LENGTHS), 4)
OPS = {
    "delta rule": (delta(WHOLE), SMALL_DELTA),
    "delta rule in segments": (delta(CUT), SMALL_DELTA),
    "delta rule in PyTorch": (delta_reference.gated_delta_rule, SMALL_DELTA),
    "convolution": (conv.causal_conv1d, SMALL_CONV),
    "convolution in PyTorch": (conv_reference.causal_conv1d, SMALL_CONV),
}


@pytest.mark.parametrize("op, inputs", OPS.values(), ids=OPS)
def test_outputs_and_gradients_do_not_depend_on_it(op, inputs, poisoned_memory):
    torch.manual_seed(0)
    make, *sizes = inputs
    inputs, sequences = [x.to(DEVICE).requires_grad_() for x in make(*sizes)], Sequences.of(LENGTHS, DEVICE)
    found = []
    for asked in (True, False):
        output, state = op(*inputs, sequences, output_final_state=asked)
        assert (state is not None) == asked
        found.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    assert all(torch.equal(x, y) and torch.isfinite(x).all() for x, y in zip(*found, strict=True))


class Allocated(TorchDispatchMode):
    """Bytes of all tensors that ops make of nothing."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if function._schema.name.startswith(("aten::empty", "aten::new_empty", "aten::zeros", "aten::new_zeros")):
            self.bytes += result.nbytes
        return result


def test_many_documents_cost_no_memory_for_their_states(monkeypatch):
    """32,768 tokens in documents of 16, of which no kernel computes anything here."""
    monkeypatch.setattr(Kernel, "__getitem__", lambda kernel, programs: lambda *arguments, **options: None)
    tokens, heads, dim = 32768, 8, 256
    sequences, like = Sequences.of((16,) * (tokens // 16), "meta"), {"dtype": torch.bfloat16, "device": "meta"}
    states = 4 * sequences.count * heads * dim**2
    rows = 2 * sequences.count * 3 * heads * dim
    for op, inputs, expected in (
        (gdn.gated_delta_rule, delta_inputs(tokens, heads, dim, **like), states),
        (conv.causal_conv1d, conv_inputs(tokens, heads * dim, **like), rows),
    ):
        inputs, taken = [x.requires_grad_() for x in inputs], []
        for asked in (False, True, False):  # the first makes what a packing's layers share
            with Allocated() as allocated:
                assert len(op(*inputs, sequences, output_final_state=asked)) == 2
            taken.append(allocated.bytes)
        assert taken[1] - taken[2] == expected
    assert states == 4 * 2**30
