"""SwiGLU's Triton kernels: on a GPU where there is one, else on Triton's interpreter with small shapes."""

from __future__ import annotations

import pytest
import torch

from megahybrid_kernels.swiglu import triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Largest error as a part of the largest value; the interpreter rounds to bf16 towards zero.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3 if DEVICE == "cuda" else 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1,), (3, 40, 24), (5, 1000)])
def test_product_and_gradients_equal_the_closed_form(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = (4 * torch.randn(3, *shape, generator=generator)).to(DEVICE, dtype)
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    y = triton.swiglu(*leaves)
    actual = (y, *torch.autograd.grad(y, leaves, grad))
    gate, up, grad = gate.double(), up.double(), grad.double()
    sigmoid = 1 / (1 + torch.exp(-gate))
    expected = gate * sigmoid * up, grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid
    for x, z in zip(actual, expected, strict=True):
        assert x.dtype == dtype and x.shape == z.shape
        assert (x.double() - z).abs().max() <= TOLERANCES[dtype] * z.abs().max()


@pytest.mark.filterwarnings("ignore:overflow")
def test_large_gates_and_strides():
    gate = torch.tensor([-200.0, -90, -30, 30, 90, 200], device=DEVICE).repeat(7, 2)[:, ::2].requires_grad_()
    up = torch.arange(1.0, 85, device=DEVICE).view(7, 12)[:, 1::2].requires_grad_()
    y = triton.swiglu(gate, up)
    dgate, dup = torch.autograd.grad(y, (gate, up), torch.ones_like(y))
    silu = gate.detach().double() * torch.sigmoid(gate.detach().double())
    torch.testing.assert_close(y.double(), silu * up.double(), rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(dup.double(), silu, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(dgate, up * (gate > 0), rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_halves_of_a_product():
    product = torch.randn(7, 2 * triton._BLOCK + 80, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    halves = product.split(triton._BLOCK + 40, 1)
    assert torch.equal(triton.swiglu(*halves), triton.swiglu(*(x.contiguous() for x in halves)))
