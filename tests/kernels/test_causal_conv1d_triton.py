"""The causal convolution's Triton kernels: on a GPU where there is one, else on Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from test_causal_conv1d import assert_same, make_inputs, oracle, run

from megahybrid_kernels import Sequences
from megahybrid_kernels.causal_conv1d import triton as conv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (1, 12, 2, 6, 3, 1)
# Largest error as a part of the largest value. bf16 rounds results once, gradients of rows in the new state twice; the
# interpreter rounds towards zero.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 6e-3 if DEVICE == "cuda" else 1.6e-2}


@pytest.fixture(autouse=True)
def few_programs_and_poisoned_memory(monkeypatch, poisoned_memory):
    """Spans of 8 to 16 tokens; what a kernel leaves unwritten is NaN."""
    monkeypatch.setattr(conv, "_CHANNELS", 8)


def op_for(lengths):
    sequences = Sequences.of(lengths, DEVICE)
    return lambda x, weight, state=None: conv.causal_conv1d(x, weight, sequences, state, True)


def on_device(op):
    """`op` with inputs of the CPU."""
    return lambda *inputs: tuple(y.cpu() for y in op(*(x.to(DEVICE) for x in inputs)))


@pytest.mark.parametrize(
    "width, channels, dtype",
    [
        (4, 6, torch.float32),
        (1, 16, torch.float32),
        (2, 5, torch.float32),
        (6, 3, torch.float32),
        (4, 8, torch.bfloat16),
    ],
)
def test_outputs_states_and_gradients_equal_direct_sums(width, channels, dtype):
    inputs = [x.to(dtype) for x in make_inputs(LENGTHS, width, channels)]
    actual = run(on_device(op_for(LENGTHS)), inputs)
    assert all(x.dtype == dtype for x in actual)
    assert_same(actual, run(lambda *x: oracle(*x, LENGTHS), [x.double() for x in inputs]), TOLERANCES[dtype])


@pytest.mark.parametrize("programs, rows", [(1, 4), (3, 2), (3, 1), (4, 8), (1000, 2)])
def test_no_initial_state_any_number_of_spans_and_of_rows_on_their_way(programs, rows, monkeypatch):
    monkeypatch.setattr(conv, "_BYTES", 4 * rows)
    monkeypatch.setattr(conv, "_FORWARD_PROGRAMS", 2 * programs)
    monkeypatch.setattr(conv, "_BACKWARD_PROGRAMS", 2 * programs)
    lengths = (5, 9, 3, 1, 19, 1)
    x, weight, state = make_inputs(lengths, channels=13, seed=3)
    actual = run(on_device(op_for(lengths)), [x.float(), weight.float()])
    expected = run(
        lambda *t: oracle(*t, torch.zeros_like(state), lengths), [x.float().double(), weight.float().double()]
    )
    for a, b in zip(actual, expected, strict=True):
        assert (a.double() - b).abs().max() <= TOLERANCES[torch.float32] * b.abs().max()


def test_packed_sequences_equal_separate_ones():
    inputs = [x.float() for x in make_inputs(LENGTHS, seed=1)]

    def separately(x, weight, state):
        parts = zip(x.split(LENGTHS), state.split(1), strict=True)
        pieces = [op_for((len(part),))(part, weight, past) for part, past in parts]
        return torch.cat([y for y, _ in pieces]), torch.cat([state for _, state in pieces])

    assert_same(run(on_device(op_for(LENGTHS)), inputs), run(on_device(separately), inputs), 1e-6)


def test_another_sequence_does_not_matter_at_all():
    x, weight, _ = (t.float().to(DEVICE) for t in make_inputs(LENGTHS, seed=4))
    x.requires_grad_()
    y, _ = op_for(LENGTHS)(x, weight)
    (dx,) = torch.autograd.grad(y[1:13].sum(), x)
    assert (dx[:1] == 0).all() and (dx[13:] == 0).all()
    poisoned = x.detach().clone()
    poisoned[13:] = torch.nan
    poisoned[:1] = torch.nan
    again, _ = op_for(LENGTHS)(poisoned, weight)
    assert torch.equal(again[1:13], y[1:13])


def test_strided_inputs_and_only_one_output_used():
    x, weight, state = (t.float().to(DEVICE) for t in make_inputs((9, 4), channels=12, seed=5))
    leaves = [x.requires_grad_(), weight.requires_grad_(), state.requires_grad_()]
    whole = op_for((9, 4))(x.contiguous(), weight, state)
    parts = op_for((9, 4))(torch.cat([x, x], 1)[:, :12], weight, state)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    dx, dweight, dstate = torch.autograd.grad(whole[1].sum(), leaves)
    expected = torch.zeros_like(x)
    expected[[6, 7, 8, 10, 11, 12]] = 1
    assert torch.equal(dx, expected) and (dweight == 0).all() and (dstate == 0).all()


def test_gradients_in_a_part_of_a_wider_tensor():
    x, weight, state = (t.float().to(DEVICE).requires_grad_() for t in make_inputs((9, 4), channels=12, seed=6))
    y, _ = op_for((9, 4))(x, weight, state)
    dy = torch.randn(13, 30, device=DEVICE)[:, 8:20]
    leaves = (x, weight, state)
    whole = torch.autograd.grad(y, leaves, dy.contiguous(), retain_graph=True)
    parts = torch.autograd.grad(y, leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_sums_far_from_zero_stay_finite():
    values = torch.tensor([-1e30, -1e4, -90.0, -30.0, 0.0, 30.0, 90.0, 1e4, 1e30])[:, None].repeat(1, 8).to(DEVICE)
    x, weight = values.requires_grad_(), torch.ones(8, 1, device=DEVICE)
    y, _ = op_for((9,))(x, weight)
    (dx,) = torch.autograd.grad(y.sum(), x)
    exact = x.detach().double()
    gate = exact.sigmoid()
    torch.testing.assert_close(y.double(), exact * gate, rtol=4e-6, atol=1e-30)
    torch.testing.assert_close(dx.double(), gate * (1 + exact * (1 - gate)), rtol=4e-6, atol=1e-30)
