"""Steps of decoding with the Triton kernels: on a GPU where there is one, else on Triton's interpreter."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import interpreted
from oracles_lte import FLOAT32_TOLERANCE, dense_attention
from test_causal_conv1d import make_inputs as conv_inputs
from test_causal_conv1d import oracle as conv_oracle
from test_gated_delta_rule import make_inputs as delta_inputs
from test_gated_delta_rule import oracle as delta_oracle

from megahybrid_kernels import Sequences, targets
from megahybrid_kernels.attention import GrowingCache, attention_with_cache, reference, triton_decode
from megahybrid_kernels.causal_conv1d.triton_step import causal_conv1d_step
from megahybrid_kernels.gated_delta_rule import triton_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of rounding to bf16: the interpreter cuts digits off.
ROUNDING = 4e-3 if DEVICE == "cuda" else 8e-3
DELTA_NAMES = ("q", "k", "v", "a", "b", "A_log", "dt_bias")


def error(found, expected):
    """Largest difference as a part of the largest value."""
    return ((found.cpu().double() - expected).abs().max() / expected.abs().max()).item()


def delta_steps(inputs, count, steps, dtype, **options):
    """Outputs `[count * steps, …]`, those of a sequence together, and the memory, after so many launches."""
    q, k, v, a, b, A_log, dt_bias = (x.to(DEVICE, dtype) for x in inputs[:7])
    state = inputs[7].to(DEVICE, torch.float32)
    rows = torch.arange(count * steps, device=DEVICE).view(count, steps)
    outputs = [
        triton_step.gated_delta_rule_step(*(x[rows[:, t]] for x in (q, k, v, a, b)), A_log, dt_bias, state, **options)
        for t in range(steps)
    ]
    return torch.stack(outputs, 1).flatten(0, 1), state


@pytest.mark.parametrize(
    "heads, programs", interpreted({((2, 2), 64), ((1, 3), 1)}, product([(2, 2), (1, 3)], [1, 64]))
)
@pytest.mark.parametrize("sizes", [(8, 8), (16, 24), (20, 40)])
def test_delta_rule(sizes, heads, programs, monkeypatch):
    monkeypatch.setattr(triton_step, "_PROGRAMS", programs)
    count, steps = 3, 4
    inputs = delta_inputs((steps,) * count, 1, *heads, *sizes)
    expected = delta_oracle(*inputs, (steps,) * count)
    found = delta_steps(inputs, count, steps, torch.float32)
    assert all(error(x, y) < 2e-6 for x, y in zip(found, expected, strict=True))


def test_delta_rule_with_negative_eigenvalues():
    count, steps = 2, 6
    inputs = delta_inputs((steps,) * count, 3)
    inputs[DELTA_NAMES.index("k")].fill_(1.0)
    expected = delta_oracle(*inputs, (steps,) * count, strongest=2)
    found = delta_steps(inputs, count, steps, torch.float32, allow_neg_eigval=True)
    assert all(error(x, y) < 2e-6 for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"a": 60.0, "A_log": 2.5},  # the decay forgets all
        {"a": -30.0, "dt_bias": -5.0},  # and nothing
        {"b": -200.0},  # nothing is written
        {"b": 200.0},  # all is overwritten
        {"k": 1.0},  # with the same key
        {"k": 0.0, "q": 0.0},
    ],
)
def test_delta_rule_at_its_limits(changes):
    count, steps = 2, 6
    inputs = delta_inputs((steps,) * count, 2)
    for name, value in changes.items():
        inputs[DELTA_NAMES.index(name)].fill_(value)
    expected = delta_oracle(*inputs, (steps,) * count)
    found = delta_steps(inputs, count, steps, torch.float32)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.cpu().double(), y, rtol=2e-6, atol=2e-6)


def test_delta_rule_keeps_weak_decays():
    """A decay of 8e-7 a step is not rounded to none: its sum over the steps shows."""
    count, steps = 1, 40
    inputs = delta_inputs((steps,) * count, 3)
    inputs[3].fill_(-18.0), inputs[4].fill_(-200.0), inputs[5].fill_(4.0), inputs[6].fill_(0.0)
    _, expected = delta_oracle(*inputs, (steps,) * count)
    _, found = delta_steps(inputs, count, steps, torch.float32)
    lost = 1 - expected / inputs[7]
    assert lost.min() > 3e-5
    assert ((1 - found.cpu().double() / inputs[7]) / lost - 1).abs().max() < 0.3


def test_delta_rule_in_bfloat16():
    count, steps = 2, 8
    inputs = [x.to(torch.bfloat16).double() for x in delta_inputs((steps,) * count, 4, 2, 4, 16, 16)[:7]]
    inputs.append(delta_inputs((steps,) * count, 4, 2, 4, 16, 16)[7].float().double())
    expected = delta_oracle(*inputs, (steps,) * count)
    o, state = delta_steps(inputs, count, steps, torch.bfloat16)
    assert error(o, expected[0]) < ROUNDING and error(state, expected[1]) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width, channels", [(4, 6), (2, 300), (1, 5)])
def test_convolution(width, channels, dtype):
    count, steps = 3, 6
    x, weight, state = (each.to(dtype) for each in conv_inputs((steps,) * count, width, channels))
    expected = conv_oracle(x, weight, state, (steps,) * count)
    rows = torch.arange(count * steps).view(count, steps)
    weight, state = weight.to(DEVICE), state.to(DEVICE)
    y = torch.stack([causal_conv1d_step(x[rows[:, t]].to(DEVICE), weight, state) for t in range(steps)], 1)
    assert error(y.flatten(0, 1), expected[0]) < (2e-6 if dtype == torch.float32 else ROUNDING)
    assert torch.equal(state.cpu().double(), expected[1])


HEADS = [(2, 16), (6, 8)]
# Every pair of a window, heads, and how many programs there are.
PAIRS = {
    *((None, (2, 16), 1), (None, (6, 8), 12), (None, (6, 8), 1000)),
    *((1, (6, 8), 1), (1, (2, 16), 12), (1, (2, 16), 1000)),
    *((20, (6, 8), 1), (20, (2, 16), 12), (20, (6, 8), 1000), (20, (2, 16), 1000)),
}


@pytest.mark.parametrize("window, heads, programs", interpreted(PAIRS, product([None, 1, 20], HEADS, [1, 12, 1000])))
def test_attention(window, heads, programs, monkeypatch, slots=16):
    """From the first token on, and past the window, whose slots begin anew at 60; None is a cache with room for all."""
    monkeypatch.setattr(triton_decode, "_SLOTS", slots)
    monkeypatch.setattr(triton_decode, "_PROGRAMS", programs)
    (query_heads, head_dim), heads, steps, starts = heads, 2, 25 if DEVICE == "cuda" else 10, torch.tensor([0, 55])
    total, generator = int(starts.max()) + steps, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, total, h, head_dim, generator=generator) for h in (query_heads, heads, heads))
    capacity = window or total + 3
    # What blank slots hold is not read, not even as a factor of zero.
    cache_k, cache_v = (torch.full((2, heads, capacity, head_dim), torch.nan) for _ in range(2))
    for n, start in enumerate(starts.tolist()):
        for p in range(max(0, start - capacity), start):
            cache_k[n, :, p % capacity], cache_v[n, :, p % capacity] = k[n, p], v[n, p]
    if window is not None:
        cache_k[:, :, 1:].nan_to_num_(), cache_v[:, :, 1:].nan_to_num_()
    cache_k, cache_v = cache_k.to(DEVICE), cache_v.to(DEVICE)
    row, column = torch.arange(total)[:, None], torch.arange(total)
    visible = (column <= row) & (row - column < (window or total))
    expected = [
        dense_attention(q[n].double(), k[n].double(), v[n].double(), visible.expand(heads, -1, -1)) for n in range(2)
    ]
    for step in range(steps):
        new, each = starts + step, torch.arange(2)
        o = triton_decode.attention_step(
            *(x[each, new].to(DEVICE) for x in (q, k, v)), cache_k, cache_v, new.to(DEVICE)
        )
        wanted = torch.stack([expected[n][new[n]] for n in range(2)])
        torch.testing.assert_close(o.cpu().double(), wanted, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
    newest = starts + steps - 1
    assert torch.equal(cache_v.cpu()[each, :, newest % capacity], v[each, newest])


def test_attention_by_a_table_with_less_memory(monkeypatch):
    monkeypatch.setattr(targets, "FORCED", "cdna3")
    monkeypatch.setattr(triton_decode, "_BYTES", 16 * 16 * 4)  # of 16 keys
    test_attention(20, (2, 16), 12, monkeypatch, slots=32)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("head_dim, query_heads, heads, capacity", [(64, 32, 8, 70_000), (128, 8, 8, 5000)])
def test_attention_on_long_caches_in_bfloat16(head_dim, query_heads, heads, capacity):
    positions = torch.tensor([capacity - 1, capacity // 3, 1], device=DEVICE)
    q = torch.randn(3, query_heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
    new_k, new_v = (torch.randn(3, heads, head_dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(3, heads, capacity, head_dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    o = triton_decode.attention_step(q, new_k, new_v, k, v, positions)
    for n, position in enumerate(positions.tolist()):
        assert torch.equal(k[n, :, position], new_k[n])
        keys, values = (x[n, :, : position + 1].double().repeat_interleave(query_heads // heads, 0) for x in (k, v))
        wanted = F.scaled_dot_product_attention(q[n].double()[:, None], keys, values)[:, 0]
        assert error(o[n], wanted.cpu()) < 1e-2


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("query_heads", [2, 8])
def test_prefill_in_pieces_in_bfloat16(query_heads):
    """On a cache that has tokens already: the last query is the one that sees the last key."""
    kind = {"dtype": torch.bfloat16, "device": DEVICE}
    cache = GrowingCache.empty(2, 2, 64, **kind)
    exact = GrowingCache.empty(2, 2, 64, dtype=torch.float64, device=DEVICE)
    seen = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for lengths in ((300, 1), (5, 200), (1, 1), (130, 64)):
        sequences = Sequences.of(lengths, DEVICE, seen)
        q, k, v = (torch.randn(sum(lengths), h, 64, **kind) for h in (query_heads, 2, 2))
        with torch.inference_mode():
            o, cache = attention_with_cache(q, k, v, cache, sequences)
            double = (x.double() for x in (q, k, v))
            wanted, exact = reference.attention_with_growing_cache(*double, exact, sequences)
        assert error(o, wanted.cpu()) < 1e-2
        seen = seen + torch.tensor(lengths, device=DEVICE)
