"""Rotary embedding's Triton kernel: on a GPU where there is one, else on Triton's interpreter with small shapes."""

from __future__ import annotations

import pytest
import torch
from test_rotary import FAR, THETA, TOLERANCES, turned

from megahybrid_kernels import Sequences
from megahybrid_kernels.rotary import reference, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, head_dim", [(2, 16), (9, 2), (1, 24), (17, 96)])
def test_heads_are_turned_by_their_positions_and_gradients_turned_back(heads, head_dim, dtype):
    sequences = Sequences.of((5, 17, 1, 1, 5, 7), starts=torch.tensor([0, 17, *FAR]))
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 36, heads, head_dim, generator=generator, dtype=torch.float64).to(dtype)
    leaf = x.to(DEVICE).requires_grad_()
    y = triton.rotary(leaf, sequences.positions.to(DEVICE), THETA)
    (dx,) = torch.autograd.grad(y, leaf, grad.to(DEVICE))
    assert y.dtype == dx.dtype == dtype
    expected = turned(x, sequences.positions), turned(grad, sequences.positions, -1)
    actual = y.detach().cpu().double(), dx.cpu().double()
    tolerance = TOLERANCES[dtype] * (1 if DEVICE == "cuda" else 2)  # the interpreter rounds towards zero
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_strided_heads_equal_the_pytorch_path():
    """The angles are the same fp32 numbers, so that what is left is the sine's own error."""
    fused = torch.randn(40, 7, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    positions = (torch.arange(40) * 2**31 + 3).to(DEVICE)
    actual = triton.rotary(fused[:, 2:5], positions, THETA)
    torch.testing.assert_close(actual, reference.rotary(fused[:, 2:5], positions, THETA), rtol=0, atol=2e-6)


def test_queries_and_keys_together_are_turned_as_each_alone():
    positions = torch.arange(21).to(DEVICE)
    fused = torch.randn(21, 13, 16, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for first, last in ((9, 13), (1, 10), (3, 4)):
        leaves = [x.clone().requires_grad_() for x in (fused[:, :first], fused[:, first:last])]
        together = triton.rotary_of_both(*leaves, positions, THETA)
        alone = [triton.rotary(x, positions, THETA) for x in leaves]
        assert all(map(torch.equal, together, alone))
        cotangents = [fused[:, :first], fused[:, first:last]]
        found = (torch.autograd.grad(ys, leaves, cotangents) for ys in (together, alone))
        assert all(map(torch.equal, *found))
