"""The gated delta rule in Triton: on a GPU where there is one, else on Triton's interpreter with small shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import interpreted
from test_gated_delta_rule import CASES, NAMES, change, make_inputs, oracle, run

from megahybrid_kernels import Sequences
from megahybrid_kernels.gated_delta_rule import reference
from megahybrid_kernels.gated_delta_rule import triton as gdn

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
# Several blocks of columns at small head dims; sequences are never cut, or as soon as they have two chunks.
WHOLE = replace(gdn.tuning(16, torch.float32, torch.device(DEVICE)), programs=0)
CUT = replace(WHOLE, programs=10**6, shortest=1, whole=0)


def op_for(lengths, tune=WHOLE, **options):
    def op(*x):
        moved = [t.to(DEVICE) for t in x[:-1]]
        borders, initial = Sequences.of(lengths, DEVICE), x[-1].to(DEVICE)
        o, state = gdn.gated_delta_rule(*moved, borders, initial, True, tune=tune, **options)
        return o.cpu(), state.cpu()

    return op


def assert_same(actual, expected, output_tolerance, gradient_tolerance, gate_tolerance=None):
    """By the largest error as a part of the largest value, as in test_gated_delta_rule."""
    for name, x, y in zip(("o", "state", *NAMES), actual, expected, strict=True):
        tolerance = output_tolerance if name in ("o", "state") else gradient_tolerance
        if name in ("a", "b", "A_log", "dt_bias"):
            tolerance = gate_tolerance or gradient_tolerance
        assert torch.isfinite(x).all(), name
        error = (x.double() - y.double()).abs().max().item()
        assert error <= tolerance * max(y.abs().max().item(), 0.1), f"{name}: {error} of {y.abs().max().item()}"


def check(inputs, lengths, tune=WHOLE, tolerances=(2e-5, 5e-5)):
    expected = run(lambda *x: oracle(*x, lengths), [x.double() for x in inputs])
    assert_same(run(op_for(lengths, tune), inputs), expected, *tolerances)


def in_dtype(inputs, dtype):
    return [x.to(dtype) for x in inputs[:5]] + [x.float() for x in inputs[5:]]


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_the_token_recurrence(case):
    lengths = (1, 63, 65, 130)
    inputs = change(make_inputs(lengths, key_heads=1, value_heads=1, key_dim=16, value_dim=16), case)
    check(in_dtype(inputs, torch.float32), lengths)


GROUPED = [(2, 4, 16, 32), (1, 1, 24, 40), (1, 2, 32, 16)]


@pytest.mark.parametrize(
    "key_heads, value_heads, key_dim, value_dim, tune",
    interpreted(
        [(*sizes, tune) for sizes, tune in zip(GROUPED, (CUT, WHOLE, CUT), strict=True)],
        [(*sizes, tune) for sizes in GROUPED for tune in (WHOLE, CUT)],
    ),
)
def test_grouped_value_heads_and_uneven_head_dims(key_heads, value_heads, key_dim, value_dim, tune):
    lengths = (64, 1, 140)
    inputs = make_inputs(lengths, 1, key_heads, value_heads, key_dim, value_dim)
    check(in_dtype(inputs, torch.float32), lengths, tune)


@pytest.mark.parametrize("chunk", [64, 32])
def test_segments_of_two_chunks(chunk):
    lengths, tune = (300, 5, 128), replace(CUT, shortest=2, chunk=chunk)
    check(in_dtype(make_inputs(lengths, 2, 1, 1, 16, 16), torch.float32), lengths, tune)


@pytest.mark.parametrize("case", ["plain", "repeated keys"])
def test_negative_eigenvalues(case):
    lengths = (70, 129)
    inputs = in_dtype(change(make_inputs(lengths, 8, 1, 2, 16, 16), case), torch.float32)
    expected = run(lambda *x: oracle(*x, lengths, strongest=2), [x.double() for x in inputs])
    assert_same(run(op_for(lengths, allow_neg_eigval=True), inputs), expected, 2e-5, 5e-5)


@pytest.mark.parametrize("case", ["plain", "repeated keys"])
def test_half_precision_with_the_tiles_of_training(case):
    lengths = (70, 129)
    inputs = in_dtype(change(make_inputs(lengths, 3, 1, 1, 24, 40), case), torch.float16)
    # Of like keys u and y are small differences, and db is their product.
    tune = gdn.tuning(40, torch.float16, torch.device(DEVICE))
    check(inputs, lengths, tune, (2e-3, 3e-3, 8e-3 if case == "repeated keys" else 4e-3))


@pytest.mark.parametrize("tune", [WHOLE, CUT], ids=["whole", "cut"])
def test_packed_sequences_equal_separate_ones_and_strided_inputs(tune):
    lengths = (70, 1, 64)
    inputs = in_dtype(make_inputs(lengths, 4, 2, 2, 16, 16), torch.float32)
    o, state = op_for(lengths, tune)(*inputs)
    parts = zip(*(x.split(lengths) for x in inputs[:5]), inputs[7].split(1), strict=True)
    for rows, last, part in zip(o.split(lengths), state.split(1), parts, strict=True):
        expected = op_for((len(rows),), tune)(*part[:5], *inputs[5:7], part[5])
        torch.testing.assert_close((rows, last), expected, rtol=1e-5, atol=1e-5)
    q, k, v, a, b = inputs[:5]
    fused, gates = torch.cat([q, k, v], 1), torch.cat([a, b], 1)
    strided = (fused[:, :2], fused[:, 2:4], fused[:, 4:], gates[:, :2], gates[:, 2:])
    assert torch.equal(op_for(lengths, tune)(*strided, *inputs[5:])[0], o)


def test_a_state_passed_from_piece_to_piece_equals_one_pass():
    pieces = (64, 37, 1, 60)
    inputs = in_dtype(make_inputs((162,), 5, 1, 1, 16, 16), torch.float32)

    def in_pieces(*x):
        state, outputs = x[7], []
        for part in zip(*(t.split(pieces) for t in x[:5]), strict=True):
            o, state = op_for((len(part[0]),))(*part, x[5], x[6], state)
            outputs.append(o)
        return torch.cat(outputs), state

    assert_same(run(in_pieces, inputs), run(op_for((162,)), inputs), 2e-5, 5e-5)


def test_short_sequences_are_cut_for_gradients_alone():
    tune = gdn.tuning(256, torch.bfloat16, torch.device(DEVICE))
    chunks = {
        (tokens, training): gdn.longest_segment((tokens, 1), 2, 256, tune, training)
        for tokens in (4096, 4097)
        for training in (False, True)
    }
    assert chunks[4096, False] == 64 > chunks[4096, True]
    assert chunks[4097, False] == chunks[4097, True] < 64


@pytest.mark.parametrize("tune", [WHOLE, CUT], ids=["whole", "cut"])
def test_without_a_state_and_with_one_gradient_alone(tune):
    lengths = (66, 3)
    inputs = in_dtype(make_inputs(lengths, 6, 1, 1, 16, 16), torch.float32)[:-1]
    for n in range(2):
        leaves = [x.to(DEVICE).requires_grad_() for x in inputs]
        exact = [x.double().requires_grad_() for x in inputs]
        result = gdn.gated_delta_rule(*leaves, Sequences.of(lengths, DEVICE), None, True, tune=tune)[n]
        expected = oracle(*exact, torch.zeros(2, 1, 16, 16), lengths)[n]
        torch.testing.assert_close(result.cpu().double(), expected, rtol=0, atol=2e-5)
        actual = torch.autograd.grad(result.square().sum(), leaves)
        expected = torch.autograd.grad(expected.square().sum(), exact, materialize_grads=True)
        for name, x, y in zip(NAMES[:-1], actual, expected, strict=True):
            tolerance = 1e-4 * max(y.abs().max().item(), 0.1)
            torch.testing.assert_close(x.cpu().double(), y, rtol=0, atol=tolerance, msg=name)


FULL = [  # lengths, key heads, value heads, key dim, value dim
    ((1, 63, 64, 65, 500), 2, 4, 64, 64),
    ((4097,), 1, 1, 128, 128),
    ((500, 1, 65), 2, 2, 128, 64),
    ((500, 64), 1, 2, 64, 128),
    ((500, 130), 1, 2, 256, 256),
    ((300, 33), 1, 1, 96, 192),
    ((200, 70), 2, 2, 96, 48),
]
TOLERANCES = {torch.bfloat16: (1e-2, 2e-2), torch.float16: (2e-3, 4e-3), torch.float32: (1e-4, 1e-4)}


@on_a_gpu
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("size", FULL, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_full_sizes_on_a_gpu(case, size, dtype, cut):
    """Against float64 by relative norm, in the launches that training uses, and twice the same bits."""
    lengths, *sizes = size
    inputs = [x.to(DEVICE) for x in in_dtype(change(make_inputs(lengths, 7, *sizes), case), dtype)]
    tune = gdn.tuning(max(sizes[2:]), dtype, torch.device(DEVICE))
    tune = replace(tune, programs=10**6 if cut else 0, shortest=4)
    sequences = Sequences.of(lengths, DEVICE)

    def in_float64(*x):
        return reference.gated_delta_rule(*x[:-1], sequences, x[-1], True)

    def kernels(*x):
        return gdn.gated_delta_rule(*x[:-1], sequences, x[-1], True, tune=tune)

    expected = run(in_float64, [x.double() for x in inputs])
    first, second = run(kernels, inputs), run(kernels, inputs)
    for name, x, again, truth in zip(("o", "state", *NAMES), first, second, expected, strict=True):
        assert torch.equal(x, again), name
        tolerance = TOLERANCES[dtype][name in ("a", "b", "A_log", "dt_bias")]
        # Where all decays or writes vanish so do their gradients, and nothing is left to be relative to.
        scale = max(truth.norm().item(), 1e-3 * truth.numel() ** 0.5)
        assert (x.double() - truth).norm().item() <= tolerance * scale, name
