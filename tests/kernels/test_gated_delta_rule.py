"""The gated delta rule against a float64 recurrence over single tokens: outputs, states and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megahybrid_kernels import Sequences
from megahybrid_kernels.gated_delta_rule import gated_delta_rule

LENGTHS = (1, 200, 2, 63, 64, 65, 130, 1)
NAMES = ("q", "k", "v", "a", "b", "A_log", "dt_bias", "initial_state")
# Largest error as a part of the largest value. bf16 inputs are exact in float64, so only the outputs are rounded.
TOLERANCES = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-5, 2e-5), torch.bfloat16: (4e-3, 8e-3)}


def oracle(q, k, v, a, b, A_log, dt_bias, state, lengths, strongest=1):
    """Token by token, sequence by sequence, with vectors and outer products, in float64; beta is up to `strongest`."""
    q, k, v, a, b, A_log, dt_bias, state = (x.double() for x in (q, k, v, a, b, A_log, dt_bias, state))
    groups = v.shape[1] // k.shape[1]
    outputs, final, start = [], [], 0
    for n, length in enumerate(lengths):
        S = state[n]
        for t in range(start, start + length):
            alpha = torch.exp(-A_log.exp() * torch.logaddexp(a[t] + dt_bias, torch.zeros_like(dt_bias)))
            beta = strongest / (1 + torch.exp(-b[t]))
            rows = [
                (x[t] / (x[t].pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(groups, 0) for x in (q, k)
            ]
            decayed = alpha[:, None, None] * S
            error = v[t] - torch.einsum("hkv,hk->hv", decayed, rows[1])
            S = decayed + torch.einsum("h,hk,hv->hkv", beta, rows[1], error)
            outputs.append(torch.einsum("hkv,hk->hv", S, rows[0]) / k.shape[-1] ** 0.5)
        final.append(S)
        start += length
    return torch.stack(outputs), torch.stack(final)


def make_inputs(lengths, seed=0, key_heads=2, value_heads=2, key_dim=8, value_dim=8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    T = sum(lengths)
    return [
        normal(T, key_heads, key_dim),
        normal(T, key_heads, key_dim),
        normal(T, value_heads, value_dim),
        normal(T, value_heads),
        normal(T, value_heads),
        normal(value_heads) * 0.5,
        normal(value_heads) - 2,
        normal(len(lengths), value_heads, key_dim, value_dim),
    ]


def run(op, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """o, the final state, and the gradients of a sum over both with random weights."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    o, state = op(*leaves)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (o, state)]
    loss = sum((x.double() * w.to(x.device)).sum() for x, w in zip((o, state), weights, strict=True))
    return (o, state, *torch.autograd.grad(loss, leaves))


def op_for(lengths):
    return lambda *x: gated_delta_rule(*x[:-1], Sequences.of(lengths), x[-1])


def assert_same(actual, expected, output_tolerance, gradient_tolerance):
    for name, x, y in zip(("o", "state", *NAMES), actual, expected, strict=True):
        tolerance = output_tolerance if name in ("o", "state") else gradient_tolerance
        assert torch.isfinite(x).all(), name
        error = (x.double() - y.double()).abs().max().item()
        assert error <= tolerance * max(y.abs().max().item(), 0.1), f"{name}: {error} of {y.abs().max().item()}"


def change(inputs: list[Tensor], case: str) -> list[Tensor]:
    q, k, v, a, b, A_log, dt_bias, state = inputs
    if case == "strong decay":
        # Every fifth token forgets all, the others nearly nothing: the weak decays must survive next to g of -1e3.
        a = torch.where(torch.arange(len(a))[:, None] % 5 == 0, 1000.0, -6.0) + 0.1 * a
        A_log, dt_bias = torch.zeros_like(A_log), torch.zeros_like(dt_bias)
    elif case == "all decay":
        a, A_log = a + 1000, A_log * 0
    elif case == "no decay":
        a = a - 1000
    elif case == "beta 0":
        b = b - 30
    elif case == "beta 1":
        b = b + 30
    elif case == "repeated keys":
        k, a, b = k[:1].expand_as(k), a - 5, b + 3
    return [q, k, v, a, b, A_log, dt_bias, state]


CASES = ("plain", "strong decay", "all decay", "no decay", "beta 0", "beta 1", "repeated keys")


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_the_token_recurrence(case):
    inputs = change(make_inputs(LENGTHS), case)
    expected = run(lambda *x: oracle(*x, LENGTHS), inputs)
    assert_same(run(op_for(LENGTHS), inputs), expected, *TOLERANCES[torch.float64])
    single = [x.float() for x in inputs]
    expected = run(lambda *x: oracle(*x, LENGTHS), [x.double() for x in single])
    assert_same(run(op_for(LENGTHS), single), expected, *TOLERANCES[torch.float32])


def test_negative_eigenvalues():
    inputs = change(make_inputs(LENGTHS), "repeated keys")
    expected = run(lambda *x: oracle(*x, LENGTHS, strongest=2), inputs)

    def op(*x):
        return gated_delta_rule(*x[:-1], Sequences.of(LENGTHS), x[-1], allow_neg_eigval=True)

    assert_same(run(op, inputs), expected, *TOLERANCES[torch.float64])


@pytest.mark.parametrize("key_heads, value_heads, key_dim, value_dim", [(2, 6, 8, 8), (1, 2, 4, 12), (3, 3, 16, 8)])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_grouped_value_heads_uneven_head_dims_and_dtypes(key_heads, value_heads, key_dim, value_dim, dtype):
    lengths = (33, 1, 70)
    inputs = make_inputs(lengths, 1, key_heads, value_heads, key_dim, value_dim)
    inputs = [x.to(dtype) for x in inputs[:5]] + [x.to(torch.promote_types(dtype, torch.float32)) for x in inputs[5:]]
    actual = run(op_for(lengths), inputs)
    assert actual[0].dtype == dtype
    assert actual[1].dtype == torch.promote_types(dtype, torch.float32)
    expected = run(lambda *x: oracle(*x, lengths), [x.double() for x in inputs])
    assert_same(actual, expected, *TOLERANCES[dtype])


def test_packed_sequences_equal_separate_ones():
    lengths = (130, 1, 64, 65, 2)
    inputs = make_inputs(lengths, 2)
    packed = run(op_for(lengths), inputs)

    def separately(*x):
        parts = zip(*(t.split(lengths) for t in x[:5]), x[7].split(1), strict=True)
        pieces = [op_for((len(p[0]),))(*p[:5], x[5], x[6], p[5]) for p in parts]
        return torch.cat([o for o, _ in pieces]), torch.cat([state for _, state in pieces])

    assert_same(packed, run(separately, inputs), 1e-12, 1e-12)


def test_a_state_passed_from_piece_to_piece_equals_one_pass():
    lengths, pieces = (100, 100), (1, 37, 1, 1, 60)
    inputs = make_inputs(lengths, 3)

    def in_pieces(*x):
        rows = [t.unflatten(0, (2, 100)) for t in x[:5]]
        state, outputs, start = x[7], [], 0
        for piece in pieces:
            part = [t[:, start : start + piece].flatten(0, 1) for t in rows]
            o, state = op_for((piece, piece))(*part, x[5], x[6], state)
            outputs.append(o.unflatten(0, (2, piece)))
            start += piece
        return torch.cat(outputs, 1).flatten(0, 1), state

    assert_same(run(in_pieces, inputs), run(op_for(lengths), inputs), 1e-12, 1e-12)


def test_no_initial_state_is_an_empty_memory():
    lengths = (40, 3)
    inputs = make_inputs(lengths, 4)[:-1]
    o, state = gated_delta_rule(*inputs, Sequences.of(lengths), output_final_state=True)
    expected = oracle(*inputs, torch.zeros(2, 2, 8, 8), lengths)
    torch.testing.assert_close((o, state), expected, rtol=0, atol=1e-12)


def test_a_packing_first_seen_in_inference_mode_can_be_trained_on():
    lengths = (19, 23)
    inputs = make_inputs(lengths, 5)
    with torch.inference_mode():
        op_for(lengths)(*inputs)
    assert torch.isfinite(run(op_for(lengths), inputs)[2]).all()


@pytest.mark.parametrize(
    "index, shape, message",
    [
        (0, (5, 2, 4), r"q is \(5, 2, 4\)"),
        (2, (5, 3, 8), "3 value heads are not a multiple"),
        (3, (5, 1), r"a is \(5, 1\)"),
        (7, (1, 2, 8, 4), r"initial_state is \(1, 2, 8, 4\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(index, shape, message):
    inputs = make_inputs((5,))
    inputs[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        op_for((5,))(*inputs)
    with pytest.raises(ValueError, match="k has 5 tokens, but the sequences have 6"):
        op_for((6,))(*make_inputs((5,)))
