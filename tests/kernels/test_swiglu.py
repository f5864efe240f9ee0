"""SwiGLU's product against its closed form in float64, gradients included."""

from __future__ import annotations

import pytest
import torch

from megahybrid_kernels.swiglu import swiglu

# Largest error as a part of the largest value.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_product_and_gradients_equal_the_closed_form(dtype):
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = (4 * torch.randn(3, 40, 24, generator=generator, dtype=torch.float64)).to(dtype)
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    y = swiglu(*leaves)
    actual = (y, *torch.autograd.grad(y, leaves, grad))
    gate, up, grad = gate.double(), up.double(), grad.double()
    sigmoid = 1 / (1 + torch.exp(-gate))
    expected = gate * sigmoid * up, grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid
    for x, z in zip(actual, expected, strict=True):
        assert x.dtype == dtype
        assert (x.double() - z).abs().max() <= TOLERANCES[dtype] * z.abs().max()


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="up is"):
        swiglu(torch.ones(2, 4), torch.ones(2, 1))
