"""Rotary embedding against complex rotation by angles from integer arithmetic, gradients included."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from megahybrid_kernels import Sequences
from megahybrid_kernels.rotary import rotary

# Largest error of values around 1, at most 5: of an angle in [-pi, pi] and of the product, each rounded.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 3e-6, torch.bfloat16: 2e-2}
# 2^24 is the last whole number before float32 skips some; at 2^40 the frequencies' own 64 bits begin to show.
FAR = [4095, 524_288, 2**24 + 1001, 2**40 + 17]
AT_2_TO_40 = 1e-6
THETA = 10000.0
_BITS = 256


@cache
def radians(half):
    """theta^(-i / half) for all i, and 2 pi, as integers of `_BITS` fractional bits: roots by Newton's steps, pi by
    Machin's formula."""
    powers = []
    for i in range(half):
        power = 2 ** (_BITS * half) // int(THETA) ** i
        root = int(THETA ** (-i / half) * 2**53) << (_BITS - 53)
        for _ in range(8):
            root = ((half - 1) * root + power // root ** (half - 1)) // half
        powers.append(root)

    def arctangent_of_1_by(n):
        return sum((-1) ** k * 2**_BITS // ((2 * k + 1) * n ** (2 * k + 1)) for k in range(_BITS // 2))

    return powers, 8 * (4 * arctangent_of_1_by(5) - arctangent_of_1_by(239))


def turned(x, positions, direction=1):
    """Multiply the complex numbers x_i + i x_{i + D/2} by e^(i position theta^(-2i/D))."""
    half = x.shape[-1] // 2
    powers, two_pi = radians(half)
    angles = [[math.ldexp(position * power % two_pi, -_BITS) for power in powers] for position in positions.tolist()]
    angles = direction * torch.tensor(angles, dtype=torch.float64)[:, None]
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], -1)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_heads_are_turned_by_their_positions_and_gradients_turned_back(dtype):
    lengths = (5, 30, *(7 for _ in FAR))
    sequences = Sequences.of(lengths, starts=torch.tensor([0, 17, *FAR]))
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, sum(lengths), 2, 16, generator=generator, dtype=torch.float64).to(dtype)
    x.requires_grad_()
    y = rotary(x, sequences.positions, THETA)
    (dx,) = torch.autograd.grad(y, x, grad)
    assert y.dtype == dx.dtype == dtype
    expected = turned(x.detach(), sequences.positions), turned(grad, sequences.positions, -1)
    for one, other in zip((y.detach(), dx), expected, strict=True):
        error = (one.double() - other).abs()
        assert error[:-7].max() <= TOLERANCES[dtype]
        assert error[-7:].max() <= max(TOLERANCES[dtype], AT_2_TO_40)


def test_odd_head_dims_and_missing_positions_are_refused():
    with pytest.raises(ValueError, match="even head_dim, not 7"):
        rotary(torch.ones(3, 1, 7), torch.arange(3), THETA)
    with pytest.raises(ValueError, match="x has 3 tokens"):
        rotary(torch.ones(3, 1, 8), torch.arange(4), THETA)
