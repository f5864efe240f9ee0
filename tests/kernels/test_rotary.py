"""Rotary embedding against complex rotation in float64, gradients included."""

from __future__ import annotations

import pytest
import torch

from megahybrid_kernels import Sequences
from megahybrid_kernels.rotary import rotary

# Largest error; float32 angles near position 4096 are off by up to 4096 roundings of 2^-24 and a few more.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 4e-3, torch.bfloat16: 2e-2}
THETA = 10000.0


def turned(x, positions, direction=1):
    """Multiply the complex numbers x_i + i x_{i + D/2} by e^(i position theta^(-2i/D))."""
    half = x.shape[-1] // 2
    wavelengths = torch.tensor([THETA ** (2 * i / (2 * half)) for i in range(half)], dtype=torch.float64)
    angles = direction * positions.double()[:, None, None] / wavelengths
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], -1)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_heads_are_turned_by_their_positions_and_gradients_turned_back(dtype):
    sequences = Sequences.of((5, 1, 30), starts=torch.tensor([0, 4095, 17]))
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 36, 2, 16, generator=generator, dtype=torch.float64).to(dtype)
    x.requires_grad_()
    y = rotary(x, sequences.positions, THETA)
    (dx,) = torch.autograd.grad(y, x, grad)
    assert y.dtype == dx.dtype == dtype
    expected = turned(x.detach(), sequences.positions), turned(grad, sequences.positions, -1)
    torch.testing.assert_close((y.detach().double(), dx.double()), expected, rtol=0, atol=TOLERANCES[dtype])


def test_odd_head_dims_and_missing_positions_are_refused():
    with pytest.raises(ValueError, match="even head_dim, not 7"):
        rotary(torch.ones(3, 1, 7), torch.arange(3), THETA)
    with pytest.raises(ValueError, match="x has 3 tokens"):
        rotary(torch.ones(3, 1, 8), torch.arange(4), THETA)
