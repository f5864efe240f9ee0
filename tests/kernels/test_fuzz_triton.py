"""Random shapes against the oracles: a few cases always, and with --slow as many as fit into --fuzz SECONDS an op.

A case is its seed: `--slow --fuzz 0 --fuzz-seed SEED -k OP` runs one again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from oracles_lte import (
    assert_same_gradients,
    cut,
    dense_attention,
    dense_lte_attention,
    documents,
    leaf,
    random_pieces,
    streaming_buffer,
)
from oracles_nsa import flipped, oracle_attention
from test_attention import oracle as attention_oracle
from test_causal_conv1d import assert_same as assert_same_convolution
from test_causal_conv1d import make_inputs as conv_inputs
from test_causal_conv1d import oracle as conv_oracle
from test_causal_conv1d import run as run_convolution
from test_exit_positions import tied_scores
from test_gated_delta_rule import CASES, change
from test_gated_delta_rule import make_inputs as delta_inputs
from test_gated_delta_rule_triton import CUT, WHOLE, in_dtype
from test_gated_delta_rule_triton import check as check_delta_rule
from test_lte_attention_triton import LAUNCH, SMALL
from test_lte_attention_triton import check as check_lte_attention
from test_lte_attention_triton import inputs as lte_inputs
from test_native_sparse_attention_backward_triton import ITEMS, random_selection
from test_native_sparse_attention_backward_triton import SMALL as SMALL_SPARSE
from test_native_sparse_attention_backward_triton import check as check_sparse_gradients
from test_native_sparse_attention_backward_triton import cut as cut_sparse_gradients
from test_native_sparse_attention_backward_triton import inputs as sparse_inputs

from megahybrid_kernels import Sequences
from megahybrid_kernels.attention import attention as attention_op
from megahybrid_kernels.attention import triton_decode
from megahybrid_kernels.causal_conv1d import triton as conv
from megahybrid_kernels.exit_positions import NEVER
from megahybrid_kernels.exit_positions import reference as exits_reference
from megahybrid_kernels.exit_positions import triton as exits_triton
from megahybrid_kernels.lte_attention import LTECache, triton_columns
from megahybrid_kernels.lte_attention.triton_prefill import lte_attention_piece
from megahybrid_kernels.native_sparse_attention import triton as nsa
from megahybrid_kernels.native_sparse_attention import triton_pairs

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Draw = random.Random
Case = Callable[[Draw, int, pytest.MonkeyPatch], None]


def lengths(draw: Draw, most: int = 9) -> tuple[int, ...]:
    """Of documents: many of one token, a few of any length, or some beside borders of tiles."""
    kind = draw.choice(("ones", "few", "mixed"))
    if kind == "ones":
        return (1,) * draw.randint(1, 12 * most)
    if kind == "few":
        return tuple(draw.randint(1, 10 * most) for _ in range(draw.randint(1, 3)))
    return tuple(draw.choice((1, 1, 2, 3, 15, 16, 17, 31, 32, 33, 64)) for _ in range(draw.randint(1, most)))


def limits(draw: Draw) -> tuple[int, int, int | None]:
    """Window, sinks and buffer."""
    sinks = draw.choice((0, 1, 4, 9))
    buffer = draw.choice((None, max(1, sinks), max(1, sinks) + 1, max(1, sinks) + 7))
    return draw.choice((0, 1, 5, 16, 31, 200)), sinks, buffer


def lte_attention(draw: Draw, seed: int, patch: pytest.MonkeyPatch) -> None:
    heads, groups = draw.choice((1, 2, 3)), draw.choice((1, 2, 3, 4, 5, 6, 8, 16))
    dim = draw.choice((1, 2, 8, 16, 20, 24, 33, 48)) if groups < 8 else 16
    each, sizes = lengths(draw), limits(draw)
    patch.setattr(triton_columns, "CHUNK", draw.choice((64, 128)))
    tune = draw.choice((SMALL, replace(SMALL, keys=16, columns=16), replace(SMALL, dq=replace(LAUNCH, size=32))))
    pairs = lte_inputs(each, heads * groups, heads, dim, tied_scores(sum(each), heads, seed))
    check_lte_attention(pairs, each, *sizes, draw.choice(("value", "logit")), tune=tune, tolerance=3e-5)


def lte_prefill(draw: Draw, seed: int, patch: pytest.MonkeyPatch) -> None:
    """In pieces, against one pass over the whole."""
    count, delay, heads, dim = draw.randint(1, 3), draw.choice((0, 2, 6)), draw.choice((1, 2)), draw.choice((4, 16, 24))
    sinks, query_heads = draw.choice((0, 2)), heads * draw.choice((1, 2, 4))
    sizes = (draw.randint(delay, delay + 20), sinks, draw.randint(max(1, sinks), sinks + 20))
    pieces = random_pieces(count, draw.randint(1, 5), seed)
    whole = tuple(map(sum, zip(*pieces, strict=True)))
    q, k, v = (leaf(sum(whole), h, dim, seed=seed + n)[1].detach() for n, h in enumerate((query_heads, heads, heads)))
    score = tied_scores(sum(whole), heads, seed).float()
    expected = dense_lte_attention(q, k, v, score.double(), whole, *sizes)
    late = torch.full_like(score, torch.nan)
    for rows in documents(whole):
        late[rows.start + delay : rows.stop] = score[rows.start : max(rows.start, rows.stop - delay)]
    cache = LTECache.empty(count, heads, dim, sizes[0], sizes[2], dtype=torch.float32, device=DEVICE)
    for number, (sequences, rows) in enumerate(cut(pieces)):
        starts = sequences.starts.to(DEVICE) if number else None
        moved = (x[rows].float().to(DEVICE) for x in (q, k, v, late))
        with torch.no_grad():
            o, cache = lte_attention_piece(
                *moved, cache, Sequences.of(sequences.lengths, DEVICE, starts), *sizes, delay
            )
        torch.testing.assert_close(o.cpu().double(), expected[rows], rtol=3e-5, atol=3e-5)


def sparse_gradients(draw: Draw, seed: int, patch: pytest.MonkeyPatch) -> None:
    """Any selection, and blocks that many choose."""
    heads, groups, block_size = draw.choice((1, 2)), draw.choice((1, 2, 3, 5, 8, 16)), draw.choice((16, 16, 32, 64))
    each, num_blocks, dim = lengths(draw, 20), draw.randint(3, 6), draw.choice((8, 16, 24))
    step, window = replace(SMALL_SPARSE.key, size=draw.choice((16, 32, 64))), draw.choice((1, 5, 16, 47, 200, 1000))
    tune = replace(SMALL_SPARSE, rows=draw.choice((16, 32, 64)), key=step, selected=step, compressed=step)
    cut_sparse_gradients(patch, ITEMS | {"ITEM": draw.choice((1, 7, 64))}, lambda *_: tune)
    selection = random_selection(each, heads, block_size, num_blocks, draw.choice((None, 1, 2)), seed=seed)
    check_sparse_gradients(
        sparse_inputs(each, heads * groups, heads, dim), selection, each, block_size, window, tolerance=5e-5
    )


def sparse_attention(draw: Draw, seed: int, patch: pytest.MonkeyPatch) -> None:
    heads, groups, dim = draw.choice((1, 2)), draw.choice((1, 2, 3, 4, 6, 16)), draw.choice((8, 16, 24, 33))
    each, (block_size, num_blocks) = (*lengths(draw), draw.choice((1, 95, 96, 200))), draw.choice(((16, 4), (32, 3)))
    window = draw.choice((1, 5, 16, 33, 300))
    patch.setattr(triton_pairs, "ITEM", draw.choice((24, 1024)))
    shapes = {"q": (heads * groups, dim), "k": (heads, dim), "v": (heads, dim), "gates": (heads * groups, 3)}
    pairs = {
        name: leaf(sum(each), *shape, seed=seed + n, dtype=torch.float32)
        for n, (name, shape) in enumerate(shapes.items())
    }
    (q, k, v, gates), (*exact, exact_gates) = zip(*pairs.values(), strict=True)
    moved = (x.to(DEVICE) for x in (q, k, v, gates.sigmoid()))
    o, selection = nsa.native_sparse_attention(*moved, Sequences.of(each, DEVICE), block_size, num_blocks, window)
    flipped(selection.cpu(), q.detach(), k.detach(), each, block_size, range(0, sum(each), 7))
    expected = oracle_attention(*exact, exact_gates.sigmoid(), selection.cpu(), each, block_size, window)
    assert_same_gradients(o.cpu(), expected, pairs, 5e-5)


def delta_rule(draw: Draw, seed: int, patch: pytest.MonkeyPatch) -> None:
    each, heads, groups = lengths(draw, 20)[:6], draw.choice((1, 2)), draw.choice((1, 3))
    # Not 1: of a key of one channel only the sign counts, and of its gradient only rounding is left.
    key_dim, value_dim = draw.choice((2, 3, 16, 20, 33)), draw.choice((1, 5, 16, 24, 40))
    tune = draw.choice((WHOLE, CUT, replace(CUT, chunk=32)))
    inputs = change(delta_inputs(each, seed, heads, heads * groups, key_dim, value_dim), draw.choice(CASES))
    check_delta_rule(in_dtype(inputs, torch.float32), each, tune, (5e-5, 2e-4))


def exits(draw: Draw, seed: int, patch: pytest.MonkeyPatch) -> None:
    """Small tiles, against the buffer played token by token."""
    tiles = draw.choice(({"_OWN": 8, "_OTHERS": 16, "_BLOCKS": 4, "_PIECE": 8}, {"_OWN": 16, "_OTHERS": 32}))
    for name, size in tiles.items():
        patch.setattr(exits_triton, name, size)
    each, (window, sinks, buffer) = (*lengths(draw), draw.choice((1, 63, 64, 65, 200))), limits(draw)
    buffer = buffer or max(1, sinks) + 30
    score = tied_scores(sum(each), 1, seed, draw.choice((3, 7, 10_000))).float()
    score = score if draw.random() < 0.7 else score.abs() + 0.1
    found = exits_triton.exit_positions(score.to(DEVICE), Sequences.of(each, DEVICE), window, sinks, buffer).cpu()
    for rows in documents(each):
        values, actual = score[rows, 0].tolist(), found[rows, 0].tolist()
        _, expected = streaming_buffer(values, window, sinks, buffer)
        for token, exit_ in enumerate(actual):
            if token in expected:
                assert exit_ == (NEVER if expected[token] is None else expected[token])
            else:
                assert exit_ <= token + window + 1 and (exit_ == 0) == (values[token] <= 0)


def exits_at_real_sizes(draw: Draw, seed: int, patch: pytest.MonkeyPatch) -> None:
    """Documents that fill whole groups of blocks, in the tiles that are used, against the reference."""
    each = draw.choice(((9000,), (4096, 4096, 100), (8192,), (4097, 5000), (3, 12289)))
    tokens, kind = sum(each), draw.choice(("random", "tied", "rising", "falling", "equal"))
    score = {
        "random": torch.rand(tokens, 1, generator=torch.Generator().manual_seed(seed)) - 0.3,
        "tied": tied_scores(tokens, 1, seed, 5).float(),
        "rising": torch.linspace(0.01, 0.4, tokens)[:, None],
        "falling": torch.linspace(0.4, 0.01, tokens)[:, None],
        "equal": torch.full((tokens, 1), 0.2),
    }[kind]
    buffer = draw.choice((1, 40, 512, 5000))
    sizes = (draw.choice((0, 768)), min(4, buffer - 1), buffer)
    found = exits_triton.exit_positions(score.to(DEVICE), Sequences.of(each, DEVICE), *sizes)
    assert torch.equal(found.cpu(), exits_reference.exit_positions(score, Sequences.of(each), *sizes))


def attention(draw: Draw, seed: int, patch: pytest.MonkeyPatch) -> None:
    each, window, dim = lengths(draw), draw.choice((None, 1, 5, 33, 200)), draw.choice((1, 8, 24))
    heads, groups = draw.choice((1, 2, 3)), draw.choice((1, 2, 5))
    counts = enumerate((heads * groups, heads, heads))
    pairs = [leaf(sum(each), count, dim, seed=seed + n, dtype=torch.float32) for n, count in counts]
    expected = attention_oracle(*(exact.detach() for _, exact in pairs), each, window)
    found = attention_op(*(x.detach().to(DEVICE) for x, _ in pairs), Sequences.of(each, DEVICE), window)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=3e-5, atol=3e-5)


def attention_steps(draw: Draw, seed: int, patch: pytest.MonkeyPatch) -> None:
    """From the first token on, in a ring or in a cache with room for all."""
    count, steps, heads, groups = draw.randint(1, 3), draw.randint(1, 9), draw.choice((1, 2)), draw.choice((1, 2, 3, 5))
    dim, window = draw.choice((2, 8, 16, 24)), draw.choice((None, 1, 4, 7))
    patch.setattr(triton_decode, "_SLOTS", 16)
    patch.setattr(triton_decode, "_PROGRAMS", draw.choice((1, 12, 1000)))
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(steps, count, h, dim, generator=generator) for h in (heads * groups, heads, heads))
    capacity = window or steps + draw.randint(0, 40)
    caches = [torch.zeros(count, heads, capacity, dim, device=DEVICE) for _ in range(2)]
    row, column = torch.arange(steps)[:, None], torch.arange(steps)
    visible = ((column <= row) & (row - column < (window or steps))).expand(heads, -1, -1)
    exact = (x.double().unbind(1) for x in (q, k, v))
    expected = torch.stack([dense_attention(*each, visible) for each in zip(*exact, strict=True)], 1)
    for step in range(steps):
        positions = torch.full((count,), step, device=DEVICE)
        o = triton_decode.attention_step(*(x[step].to(DEVICE) for x in (q, k, v)), *caches, positions)
        torch.testing.assert_close(o.cpu().double(), expected[step], rtol=3e-5, atol=3e-5)


def convolution(draw: Draw, seed: int, patch: pytest.MonkeyPatch) -> None:
    each, width, channels = lengths(draw, 4), draw.randint(1, 5), draw.randint(1, 20)
    patch.setattr(conv, "_CHANNELS", 8)
    inputs = [x.float() for x in conv_inputs(each, width, channels, seed)]
    sequences = Sequences.of(each, DEVICE)

    def op(x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = conv.causal_conv1d(x.to(DEVICE), weight.to(DEVICE), sequences, state.to(DEVICE), True)
        return tuple(result.cpu() for result in results)

    expected = run_convolution(lambda *x: conv_oracle(*x, each), [x.double() for x in inputs])
    assert_same_convolution(run_convolution(op, inputs), expected, 1e-5)


CASES_OF = {
    each.__name__: each
    for each in (
        lte_attention, lte_prefill, sparse_gradients, sparse_attention, delta_rule, exits, exits_at_real_sizes,
        attention, attention_steps, convolution,
    )
}  # fmt: skip


def run(case: Case, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        try:
            case(random.Random(seed), seed, patch)
        except Exception as error:
            error.add_note(f"{case.__name__}, seed {seed}")
            raise


# Quick ones, in which tokens leave the buffer, the window or a segment.
FEW = {
    "lte_attention": (18,), "lte_prefill": (1,), "delta_rule": (204,), "exits": (45, 60), "attention": (2, 6, 7, 9),
    "attention_steps": (89, 117, 127), "convolution": (2,),
}  # fmt: skip


@pytest.mark.parametrize("name", FEW)
def test_a_few(name):
    for seed in FEW[name]:
        run(CASES_OF[name], seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES_OF)
def test_many(name, request):
    seed, end = request.config.getoption("--fuzz-seed"), time.monotonic() + request.config.getoption("--fuzz")
    run(CASES_OF[name], seed)
    while time.monotonic() < end:
        seed += 1
        run(CASES_OF[name], seed)
