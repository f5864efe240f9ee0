"""Inputs that once ended in a GPU's error, and GPUs that are not the current one. Needs a GPU, some tests two."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megahybrid_kernels import Sequences
from megahybrid_kernels.attention import KeyValueCache, attention, attention_with_cache
from megahybrid_kernels.causal_conv1d import causal_conv1d
from megahybrid_kernels.exit_positions import exit_positions
from megahybrid_kernels.gated_delta_rule import gated_delta_rule
from megahybrid_kernels.linear_cross_entropy import linear_cross_entropy
from megahybrid_kernels.lte_attention import LTECache, lte_attention, lte_attention_with_cache
from megahybrid_kernels.native_sparse_attention import native_sparse_attention
from megahybrid_kernels.norm import add_rms_norm, gated_rms_norm, rms_norm
from megahybrid_kernels.retention_router import (
    RouterParameters,
    RouterState,
    retention_logits,
    retention_scores_streamed,
)
from megahybrid_kernels.rotary import rotary
from megahybrid_kernels.swiglu import swiglu

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(GPUS == 0, reason="needs a GPU")
GIB = 2**30
HEADS, DIM, WINDOW, BUFFER = 2, 16, 16, 8


class Inputs:
    """Random tensors, the same for each seed and part of the tokens: `part` is a slice of the sequences' `lengths`."""

    def __init__(self, lengths: tuple[int, ...], heads: int, device: str, part: slice = slice(None)):
        self.total, self.heads, self.device, self.part = lengths, heads, device, part
        self.lengths = lengths[part]
        first = sum(lengths[: part.start or 0])
        self.rows = slice(first, first + sum(self.lengths))
        self.generator = torch.Generator(device).manual_seed(0)
        self.leaves: list[Tensor] = []

    def sequences(self, **options: object) -> Sequences:
        return Sequences.of(self.lengths, self.device, **options)

    def shared(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def tokens(self, *shape: int) -> Tensor:
        """Rows of the part's tokens, a leaf."""
        return self._leaf(self.shared(sum(self.total), *shape)[self.rows])

    def states(self, *shape: int) -> Tensor:
        """The same of its sequences."""
        return self._leaf(self.shared(len(self.total), *shape)[self.part])

    def _leaf(self, x: Tensor) -> Tensor:
        self.leaves.append(x.contiguous().requires_grad_(torch.is_grad_enabled()))
        return self.leaves[-1]

    def heads_of(self, groups: int = 1) -> Tensor:
        return self.tokens(self.heads * groups, DIM)

    def delta_rule(self, state: bool) -> list[Tensor]:
        rows = [self.heads_of() for _ in range(3)] + [self.tokens(self.heads) for _ in range(2)]
        gates = [self.shared(self.heads) for _ in range(2)]
        states = [self.states(self.heads, DIM, DIM)] if state else []
        return [*rows, *gates, self.sequences(), *states]

    def router(self) -> RouterParameters:
        channels = [2 * DIM >> layer for layer in range(4)]
        weights = tuple(self.shared(self.heads * channels[n + 1], channels[n], 3) for n in range(3))
        biases = tuple(self.shared(self.heads * channels[n + 1]) for n in range(3))
        return RouterParameters(weights, biases, self.shared(self.heads, channels[3]), self.shared(self.heads))


Op = Callable[[Inputs], tuple[Tensor, ...]]


def lte(x: Inputs, buffer: int | None) -> tuple[Tensor, ...]:
    q, k, v, score = x.heads_of(2), x.heads_of(), x.heads_of(), x.tokens(x.heads)
    return (lte_attention(q, k, v, score, x.sequences(), WINDOW, 2, buffer),)


def sparse(x: Inputs) -> tuple[Tensor, ...]:
    q, k, v, gates = x.heads_of(2), x.heads_of(), x.heads_of(), x.tokens(2 * x.heads, 3)
    return native_sparse_attention(q, k, v, gates.abs(), x.sequences(), 16, 3, WINDOW)[:1]


def exits(x: Inputs) -> tuple[Tensor, ...]:
    return (exit_positions(x.tokens(x.heads).detach(), x.sequences(), WINDOW, 2, BUFFER),)


def convolution(x: Inputs) -> tuple[Tensor, ...]:
    return causal_conv1d(x.tokens(200), x.shared(200, 4), x.sequences(), x.states(3, 200))


def elementwise(x: Inputs) -> tuple[Tensor, ...]:
    w, positions = x.shared(DIM), x.sequences().positions
    return (
        rms_norm(x.heads_of(), w, 1e-6),
        gated_rms_norm(x.heads_of(), x.heads_of(), w, 1e-6),
        *add_rms_norm(x.heads_of(), x.heads_of(), w, 1e-6),
        rotary(x.heads_of(), positions, 1e4),
        swiglu(x.heads_of(), x.heads_of()),
    )


def cross_entropy(x: Inputs) -> tuple[Tensor, ...]:
    labels = torch.arange(x.rows.stop - x.rows.start, device=x.device) % 50
    loss, *rest = linear_cross_entropy(x.tokens(DIM), x.shared(50, DIM), labels)
    return loss[None], *rest


def step(x: Inputs) -> tuple[Tensor, ...]:
    """Decoding: one token of each sequence, all that decode has."""
    count, heads = len(x.lengths), x.heads
    with torch.no_grad():
        starts = torch.full((count,), 40, device=x.device)
        sequences = x.sequences(starts=starts)
        delta = gated_delta_rule(*x.delta_rule(True), in_place=True)
        conv = causal_conv1d(x.tokens(200), x.shared(200, 4), sequences, x.states(3, 200), in_place=True)
        parameters = x.router()
        state = RouterState(tuple(x.states(*row.shape[1:]) for row in RouterState.empty(1, parameters).rows))
        scores, state = retention_scores_streamed(x.heads_of(), x.heads_of(), parameters, sequences, state)
        options = {"dtype": torch.float32, "device": x.device}
        cache = LTECache.empty(count, heads, DIM, WINDOW, BUFFER, **options)
        q, k, v = x.heads_of(2), x.heads_of(), x.heads_of()
        late = (cache, sequences, WINDOW, 2, BUFFER, 6)
        o, cache = lte_attention_with_cache(q, k, v, x.tokens(heads), *late, in_place=True)
        ring = KeyValueCache.empty(count, heads, DIM, WINDOW, **options)
        windowed, ring = attention_with_cache(q, k, v, ring, sequences, WINDOW, in_place=True)
    return *delta, *conv, scores, *state.rows, o, cache.k, cache.score, windowed, ring.k


def prefill(x: Inputs) -> tuple[Tensor, ...]:
    with torch.no_grad():
        parameters, count = x.router(), len(x.lengths)
        state = RouterState.empty(count, parameters)
        scores, state = retention_scores_streamed(x.heads_of(), x.heads_of(), parameters, x.sequences(), state)
        cache = LTECache.empty(count, x.heads, DIM, WINDOW, BUFFER, dtype=torch.float32, device=x.device)
        late = (x.tokens(x.heads), cache, x.sequences(), WINDOW, 2, BUFFER, 6)
        o, cache = lte_attention_with_cache(x.heads_of(2), x.heads_of(), x.heads_of(), *late)
    # A sequence's first rows have no score, and mean nothing.
    return o, cache.k, cache.score, cache.buffer_k, *state.rows, scores.where(x.sequences().offsets[:, None] >= 6, 0)


OPS: dict[str, Op] = {
    "delta rule": lambda x: gated_delta_rule(*x.delta_rule(True)),
    "lte attention": lambda x: lte(x, None),
    "lte attention with a buffer": lambda x: lte(x, BUFFER),
    "native sparse attention": sparse,
    "exits": exits,
    "router": lambda x: (retention_logits(x.heads_of(), x.heads_of(), x.router(), x.sequences()),),
    "convolution": convolution,
    "attention": lambda x: (attention(x.heads_of(2), x.heads_of(), x.heads_of(), x.sequences()),),
    "prefill": prefill,
    "elementwise": elementwise,
}
MORE = {"step": step, "cross entropy": cross_entropy}


def results(op: Op, x: Inputs) -> list[Tensor]:
    """Outputs, and the gradients of all that belongs to tokens or sequences."""
    outputs = op(x)
    found = [y.detach() for y in outputs]
    wanted = [y for y in outputs if y.requires_grad]
    if wanted:
        found += torch.autograd.grad(wanted, x.leaves, [torch.sin(y.detach()) for y in wanted])
    return found


def assert_equals_its_halves(op: Op, lengths: tuple[int, ...], heads: int) -> None:
    whole = results(op, Inputs(lengths, heads, "cuda"))
    middle = len(lengths) // 2
    parts = [results(op, Inputs(lengths, heads, "cuda", part)) for part in (slice(0, middle), slice(middle, None))]
    for number, (x, *halves) in enumerate(zip(whole, *parts, strict=True)):
        expected = torch.cat(halves)
        assert torch.isfinite(x).all(), number
        scale = max(expected.double().abs().max().item(), 0.1)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-4 * scale, msg=lambda m, n=number: f"result {n}: {m}")


@pytest.mark.parametrize("name", OPS)
def test_4096_documents_of_16_heads(name):
    assert_equals_its_halves(OPS[name], (16,) * 4096, 16)


@pytest.mark.parametrize("name", [*OPS, "step"])
def test_70000_documents_of_one_token(name):
    assert_equals_its_halves((OPS | MORE)[name], (1,) * 70_000, HEADS)


@pytest.mark.parametrize(
    "name", ["lte attention with a buffer", "exits", "native sparse attention", "prefill", "router"]
)
def test_many_documents_longer_than_a_window(name):
    assert_equals_its_halves(OPS[name], (37, 60) * 2000, HEADS)


def test_attention_of_70000_documents_in_bfloat16():
    """torch's flash attention takes 65,535; of one token each the output is its value."""
    q, k, v = (torch.randn(70_000, 2, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    o = attention(q, k, v, Sequences.of((1,) * 70_000, "cuda"))
    assert torch.equal(o, v)
    o.backward(k.detach())
    assert torch.equal(v.grad, k)


class LongDeltaRule:
    """8 heads x 256 in bf16, with keys of `key_dim`; rows of q, k and v are 2,048 elements apart in any case.

    Of what a token has, `run` keeps what a random direction sees, for want of memory.
    """

    def __init__(self, tokens: int, key_dim: int):
        self.generator = torch.Generator("cuda").manual_seed(0)
        self.x, self.key_dim = self.random(tokens, 8, 256), key_dim
        self.gates = [self.random(tokens, 8) for _ in range(2)]
        self.shared = [self.random(8).float() for _ in range(2)]
        self.directions = {dim: self.random(dim) for dim in (key_dim, 256)}

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device="cuda", dtype=torch.bfloat16)

    def forward(self, rows: slice, state: Tensor | None) -> tuple[list[Tensor], Tensor, Tensor]:
        """The leaves, o and the last state."""
        x = self.x[rows]
        leaves = [x[..., -self.key_dim :], x[..., : self.key_dim], x, *(y[rows] for y in self.gates)]
        leaves += [] if state is None else [state]
        leaves = [y.detach().requires_grad_(torch.is_grad_enabled()) for y in leaves]
        initial = leaves[5] if len(leaves) > 5 else None
        sequences = Sequences.of((len(x),), "cuda")
        return leaves, *gated_delta_rule(*leaves[:5], *self.shared, sequences, initial)

    def run(self, rows: slice, state: Tensor | None = None, dstate: Tensor | None = None) -> list[Tensor]:
        """o, dq, dk, dv, da, db, and of the state before the gradient, if there is one."""
        leaves, o, final = self.forward(rows, state)
        outputs, upstream = ([o], [self.x[rows]]) if dstate is None else ([o, final], [self.x[rows], dstate])
        seen = [o.detach() @ self.directions[256]]
        found = torch.autograd.grad(outputs, leaves, upstream)
        return seen + [y @ self.directions[y.shape[2]] for y in found[:3]] + list(found[3:])


@pytest.mark.parametrize("key_dim, gib", [(16, 48), (256, 76)])
def test_1200000_tokens_equal_their_halves_with_the_state_between_them(key_dim, gib):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gib * GIB:
        pytest.skip(f"needs {gib} GiB")
    tokens, middle = 1_200_000, 600_000
    op = LongDeltaRule(tokens, key_dim)
    whole = op.run(slice(0, tokens))
    with torch.no_grad():
        _, _, state = op.forward(slice(0, middle), None)
    *last, dstate = op.run(slice(middle, tokens), state)
    first = op.run(slice(0, middle), None, dstate)
    for name, x, *halves in zip(("o", "q", "k", "v", "a", "b"), whole, first, last, strict=True):
        for part, expected in zip(x.split(middle), halves, strict=True):
            error = (part.float() - expected.float()).norm() / expected.float().norm()
            assert error < 2e-2, (name, error.item())


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("threads", [True, False], ids=["threads", "one thread"])
@pytest.mark.parametrize("name", [*OPS, *MORE])
def test_ops_run_on_the_device_of_their_inputs(name, threads):
    """On the second of two GPUs while the first is current: values and gradients are the same."""
    lengths, found = (1, 1, 1) if name == "step" else (5, 70, 1), []
    for device in ("cuda:0", "cuda:1"):
        with torch.autograd.set_multithreading_enabled(threads):
            x = Inputs(lengths, HEADS, device)
            found.append([y.cpu() for y in results((OPS | MORE)[name], x)])
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_inputs_on_two_gpus_are_refused():
    x, weight = torch.ones(3, 8, device="cuda:0"), torch.ones(8, device="cuda:1")
    with pytest.raises(ValueError, match="an op's inputs are on cuda:0 and cuda:1: move them to one device"):
        rms_norm(x, weight, 1e-6)
