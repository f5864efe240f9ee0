"""The causal convolution against direct sums in float64: outputs, states and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megahybrid_kernels import Sequences
from megahybrid_kernels.causal_conv1d import causal_conv1d

LENGTHS = (1, 200, 2, 63, 3, 64, 1)
# Largest error as a part of the largest value; bf16 rounds outputs, states and the gradients of bf16 inputs once.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3}


def oracle(x: Tensor, weight: Tensor, state: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """One sum per token, sequence by sequence."""
    x, weight, state = x.double(), weight.double(), state.double()
    history, outputs, final = weight.shape[1] - 1, [], []
    for part, past in zip(x.split(lengths), state, strict=True):
        rows = torch.cat([past, part])
        sums = [(rows[t : t + history + 1] * weight.T).sum(0) for t in range(len(part))]
        outputs.extend(s / (1 + torch.exp(-s)) for s in sums)
        final.append(rows[len(rows) - history :])
    return torch.stack(outputs), torch.stack(final)


def make_inputs(lengths, width=4, channels=6, seed=0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (sum(lengths), channels), (channels, width), (len(lengths), width - 1, channels)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def run(op, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """y, the final state, and the gradients of a sum over both with random weights."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = op(*leaves)
    generator = torch.Generator().manual_seed(9)
    # Weights that bf16 holds exactly, so that the gradient's path is compared and not the rounding of the weights.
    weights = [torch.randn(x.shape, generator=generator).bfloat16().double() for x in results]
    loss = sum((x.double() * w).sum() for x, w in zip(results, weights, strict=True))
    return (*results, *torch.autograd.grad(loss, leaves))


def op_for(lengths):
    return lambda x, weight, state: causal_conv1d(x, weight, Sequences.of(lengths), state)


def assert_same(actual, expected, tolerance):
    for name, x, y in zip(("y", "state", "dx", "dweight", "dstate"), actual, expected, strict=True):
        if y.numel():
            error = (x.double() - y.double()).abs().max().item()
            assert error <= tolerance * y.abs().max().item(), f"{name}: {error}"
        assert x.shape == y.shape, name


@pytest.mark.parametrize("width", [4, 1, 2])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_outputs_states_and_gradients_equal_direct_sums(dtype, width):
    inputs = [x.to(dtype) for x in make_inputs(LENGTHS, width)]
    actual = run(op_for(LENGTHS), inputs)
    assert all(x.dtype == dtype for x in actual)
    assert_same(actual, run(lambda *x: oracle(*x, LENGTHS), [x.double() for x in inputs]), TOLERANCES[dtype])


def test_packed_sequences_equal_separate_ones():
    inputs = make_inputs(LENGTHS, seed=1)

    def separately(x, weight, state):
        parts = zip(x.split(LENGTHS), state.split(1), strict=True)
        pieces = [op_for((len(part),))(part, weight, past) for part, past in parts]
        return torch.cat([y for y, _ in pieces]), torch.cat([state for _, state in pieces])

    assert_same(run(op_for(LENGTHS), inputs), run(separately, inputs), 1e-13)


def test_a_state_passed_from_piece_to_piece_equals_one_pass():
    pieces = (1, 1, 2, 9, 1, 3, 1)
    lengths = (sum(pieces),) * 2
    inputs = make_inputs(lengths, seed=2)

    def in_pieces(x, weight, state):
        outputs = []
        for part in x.unflatten(0, (2, -1)).split(pieces, 1):
            y, state = op_for((part.shape[1],) * 2)(part.flatten(0, 1), weight, state)
            outputs.append(y.unflatten(0, (2, -1)))
        return torch.cat(outputs, 1).flatten(0, 1), state

    assert_same(run(in_pieces, inputs), run(op_for(lengths), inputs), 1e-13)


def test_no_initial_state_is_zeros():
    x, weight, state = make_inputs((2, 5))
    expected = oracle(x, weight, torch.zeros_like(state), (2, 5))
    actual = causal_conv1d(x, weight, Sequences.of((2, 5)), output_final_state=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    y, nothing = causal_conv1d(x, weight, Sequences.of((2, 5)), output_final_state=False)
    assert nothing is None and torch.equal(y, actual[0])


def test_shapes_that_do_not_fit_are_refused():
    x, weight, state = make_inputs((2, 5))
    with pytest.raises(ValueError, match=r"x is \(7, 6\).* \(8, 6\)"):
        causal_conv1d(x, weight, Sequences.of((8,)))
    with pytest.raises(ValueError, match=r"initial_state is \(2, 2, 6\).* \(2, 3, 6\)"):
        causal_conv1d(x, weight, Sequences.of((2, 5)), state[:, 1:])
