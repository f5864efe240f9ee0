"""The norms against closed forms in float64, gradients included."""

from __future__ import annotations

import pytest
import torch

from megahybrid_kernels.norm import gated_rms_norm, rms_norm

# Largest error as a part of the largest value. bf16 inputs are exact in float64, so only results are rounded.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3}
EPS = 1e-3


def make_inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    x, gate, grad = torch.randn(3, 50, 3, 16, generator=generator, dtype=torch.float64).to(dtype)
    return x * 0.05, gate, torch.randn(16, generator=generator, dtype=torch.float64).to(dtype), grad


def closed_forms(x, gate, weight, grad):
    """y and the gradients of x, gate and weight under an upstream grad, by hand."""
    x, gate, weight, grad = (t.double() for t in (x, gate, weight, grad))
    rms = (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    sigmoid = 1 / (1 + torch.exp(-gate))
    unit, silu = x / rms, gate * sigmoid
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    upstream = grad * weight * silu
    dx = (upstream - unit * (upstream * unit).mean(-1, keepdim=True)) / rms
    return unit * weight * silu, dx, grad * unit * weight * slope, (grad * unit * silu).sum((0, 1))


def assert_same(actual, expected, dtype):
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == dtype
        error = (x.double() - y).abs().max().item()
        assert error <= TOLERANCES[dtype] * y.abs().max().item()


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_gated_rms_norm_and_gradients_equal_closed_forms(dtype):
    x, gate, weight, grad = make_inputs(dtype)
    leaves = [t.clone().requires_grad_() for t in (x, gate, weight)]
    y = gated_rms_norm(*leaves, EPS)
    assert_same((y, *torch.autograd.grad(y, leaves, grad)), closed_forms(x, gate, weight, grad), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rms_norm_and_gradients_equal_closed_forms(dtype):
    x, _, weight, grad = make_inputs(dtype)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    y = rms_norm(*leaves, EPS)
    # silu(gate) = 1 at this gate, which turns the gated form into the plain one.
    open_gate = torch.full(x.shape, 1.2784645427610738, dtype=torch.float64)
    expected, dx, _, dweight = closed_forms(x, open_gate, weight, grad)
    assert_same((y, *torch.autograd.grad(y, leaves, grad)), (expected, dx, dweight), dtype)


def test_shapes_that_do_not_fit_are_refused():
    x = torch.ones(4, 2, 8)
    with pytest.raises(ValueError, match="x ends in 8"):
        rms_norm(x, torch.ones(2), EPS)
    with pytest.raises(ValueError, match=r"gate is \(4, 8\)"):
        gated_rms_norm(x, x[:, 0], torch.ones(8), EPS)
