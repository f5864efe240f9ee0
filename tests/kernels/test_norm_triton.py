"""The norms' Triton kernels: on a GPU where there is one, else on Triton's interpreter with small shapes."""

from __future__ import annotations

import pytest
import torch
from test_norm import EPS, closed_forms

from megahybrid_kernels.norm import triton as norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Largest error as a part of the largest value. bf16 inputs are exact in float64, so only results are rounded; the
# interpreter rounds towards zero.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 4e-3 if DEVICE == "cuda" else 8e-3}
SHAPES = [(1, 1), (7, 16), (70, 3, 40), (5, 1, 1000)]


@pytest.fixture(autouse=True)
def few_programs_and_poisoned_memory(monkeypatch, poisoned_memory):
    """Several tiles a program; what a kernel leaves unwritten is NaN."""
    monkeypatch.setattr(norm, "_PROGRAMS", 3)
    monkeypatch.setattr(norm, "_GATED_PROGRAMS", 3)
    monkeypatch.setattr(norm, "_BACKWARD_TILE", 256)


def random(*shape, seed, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def make_inputs(shape, dtype):
    """x, gate, weight, grad."""
    x, gate, grad = (random(*shape, seed=seed, dtype=dtype) for seed in range(3))
    return (0.05 * x), gate, random(shape[-1], seed=3, dtype=dtype), grad


def gradients(op, inputs, *cotangents):
    """Outputs and gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return *(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, cotangents)


def assert_same(actual, expected, dtype):
    for number, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert x.dtype == dtype and x.shape == y.shape
        error = (x.double() - y).abs().max().item()
        assert error <= TOLERANCES[dtype] * y.abs().max().item(), f"number {number}: {error}"


def flat(x):
    return x.reshape(-1, 1, x.shape[-1])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_rms_norm(shape, dtype):
    x, gate, weight, grad = make_inputs(shape, dtype)
    actual = gradients(lambda *t: norm.gated_rms_norm(*t, EPS), (x, gate, weight), grad)
    *expected, dweight = closed_forms(flat(x), flat(gate), weight, flat(grad))
    assert_same(actual, (*(t.view(shape) for t in expected), dweight), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_and_the_norm_of_a_sum(shape, dtype):
    x, residual, weight, grad = make_inputs(shape, dtype)
    grad_total = random(*shape, seed=4, dtype=dtype)

    def exact(total):
        open_gate = torch.full(flat(x).shape, 1.2784645427610738, dtype=torch.float64, device=DEVICE)
        y, dx, _, dweight = closed_forms(flat(total), open_gate, weight, flat(grad))
        return y.view(shape), dx.view(shape), dweight

    actual = gradients(lambda *t: norm.rms_norm(*t, EPS), (x, weight), grad)
    assert_same(actual, exact(x), dtype)
    actual = gradients(lambda *t: norm.add_rms_norm(*t, EPS), (x, residual, weight), grad, grad_total)
    y, dtotal, dweight = exact(x + residual)
    dtotal = dtotal + grad_total.double()
    assert_same(actual, (y, (x + residual).double(), dtotal, dtotal, dweight), dtype)


def test_a_sum_of_which_one_output_is_used():
    x, residual, weight, grad = make_inputs((6, 24), torch.float32)
    for number in range(2):
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
        used = norm.add_rms_norm(*leaves, EPS)[number]
        dx, dresidual, dweight = torch.autograd.grad(used, leaves, grad, allow_unused=True)
        assert torch.equal(dx, dresidual)
        if number == 1:
            assert torch.equal(dx, grad) and dweight is None
        else:
            again = gradients(lambda *t: norm.rms_norm(*t, EPS), (x + residual, weight), grad)
            assert torch.equal(dx, again[1]) and torch.equal(dweight, again[2])


def test_strided_rows():
    x, gate, weight, grad = make_inputs((12, 2, 24), torch.float32)
    fused = torch.cat([x, gate], -1)
    expected = gradients(lambda *t: norm.gated_rms_norm(*t, EPS), (x, gate, weight), grad)

    def op(fused, weight):
        return norm.gated_rms_norm(fused[..., :24], fused[..., 24:], weight, EPS)

    y, dfused, dweight = gradients(op, (fused, weight), grad)
    torch.testing.assert_close((y, dfused[..., :24], dfused[..., 24:], dweight), expected, rtol=0, atol=0)


@torch.no_grad()
def test_a_gate_that_is_part_of_a_product():
    x, gate, weight, _ = make_inputs((12, 3, 24), torch.float32)
    product = torch.cat([torch.zeros_like(gate).flatten(1), gate.flatten(1), weight.expand(12, -1)], 1)
    part = product[:, 72:144].unflatten(1, (3, 24))
    expected = norm.gated_rms_norm(x.flatten(0, 1), gate.flatten(0, 1), weight, EPS).view(x.shape)
    assert torch.equal(norm.gated_rms_norm(x, part, weight, EPS), expected)
