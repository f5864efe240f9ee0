"""Decoding with the Triton kernels: on a GPU where there is one, else on Triton's interpreter."""

from importlib import import_module

import pytest
import torch
from cases import interpreted
from oracles_lte import BFLOAT16_TOLERANCE, FLOAT32_TOLERANCE, cut, documents

from megahybrid_kernels import NSACache, Sequences, native_sparse_attention_with_cache, targets
from megahybrid_kernels import sequences as packed_rows
from megahybrid_kernels.native_sparse_attention import reference, triton_decode, triton_prefill
from megahybrid_kernels.native_sparse_attention.pooling import pool

op = import_module("megahybrid_kernels.native_sparse_attention")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = 2
Tiles = packed_rows.Tiles


def inputs(tokens, groups, dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(HEADS * groups, dim), (HEADS, dim), (HEADS, dim), (HEADS * groups, 3)]
    return [torch.randn(tokens, *shape, generator=generator).to(dtype) for shape in shapes]


def filled(k, v, lengths, block_size, capacity):
    """A cache with the first `lengths` rows of k, v `[sequences, tokens, heads, dim]`; what is not in use is NaN."""
    cache = NSACache.empty(len(lengths), *k.shape[2:], block_size, dtype=k.dtype, device=DEVICE).with_room(capacity)
    for memory in cache.room.rows:
        memory.fill_(torch.nan)
    for n, length in enumerate(lengths):
        whole = length // block_size
        for x, rows, means in zip((k, v), cache.room.rows[:2], cache.room.rows[2:], strict=True):
            rows[n, :, :length] = x[n, :length].transpose(0, 1)
            means[n, :, :whole] = pool(x[n, : whole * block_size].unflatten(0, (whole, block_size))).transpose(0, 1)
    return NSACache(tuple(lengths), cache.room)


def step_beside_the_reference(x, new, cache, exact, sizes, queries=None):
    """Outputs of the step and of the reference, and the reference's cache, of the new tokens of x and queries
    `[sequences, tokens, …]`; `exact` says in which dtype the reference is."""
    rows, positions = [each[torch.arange(len(new)), new].to(DEVICE) for each in x], new.to(DEVICE)
    scored = None if queries is None else queries[torch.arange(len(new)), new].to(DEVICE)
    o = triton_decode.native_sparse_attention_step(*rows, cache, positions, *sizes, scored)
    q, k, v, gates, scored = (None if each is None else each.to(exact.k.dtype) for each in (*rows, scored))
    sequences = Sequences.of((1,) * len(new), DEVICE, positions)
    expected, exact = reference.native_sparse_attention_with_cache(
        q, k, v, gates, exact, sequences, cache.block_size, *sizes, scored
    )
    return o.to(expected.dtype), expected, exact


def few_programs(monkeypatch, programs):
    for name, value in {"_SLOTS": 16, "_PROGRAMS": programs, "_SELECTED_PROGRAMS": programs, "_LOGITS": 64}.items():
        monkeypatch.setattr(triton_decode, name, value)


SIZES = [(16, 4, 9), (16, 3, 40), (32, 6, 1), (64, 5, 64)]
# Query heads of a KV head, head dim, programs that are wished for.
SHAPES = [(3, 16, 24), (1, 8, 1), (4, 24, 12)]
FEW = {(*SIZES[0], *SHAPES[2]), (*SIZES[1], *SHAPES[1]), (*SIZES[3], *SHAPES[0])}
EVERY = [(*sizes, *shape) for sizes in SIZES for shape in [*SHAPES, (16, 64, 200)]]


@pytest.mark.parametrize("block_size, num_blocks, window_size, groups, dim, programs", interpreted(FEW, EVERY))
def test_steps_equal_the_reference(block_size, num_blocks, window_size, groups, dim, programs, monkeypatch):
    """From a first token, and over blocks' ends; at a second time bit for bit the same."""
    few_programs(monkeypatch, programs)
    starts, steps, sizes = [0, block_size - 1, 8 * block_size - 1], 2, (num_blocks, window_size)
    total = max(starts) + steps
    x = [each.unflatten(0, (3, total)) for each in inputs(3 * total, groups, dim)]
    cache = filled(x[1], x[2], starts, block_size, total + 3)
    exact = filled(x[1].double(), x[2].double(), starts, block_size, total + 3)
    for step in range(steps):
        new = torch.tensor(starts) + step
        o, expected, after = step_beside_the_reference(x, new, cache, exact, sizes)
        torch.testing.assert_close(o, expected, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
        if step == 1:
            assert torch.equal(step_beside_the_reference(x, new, cache, exact, sizes)[0], o)
        exact = after
    wanted = filled(x[1], x[2], [start + steps for start in starts], block_size, total + 3)
    for found, rows in zip(cache.room.rows, wanted.room.rows, strict=True):
        assert torch.equal(found.nan_to_num(), rows.nan_to_num())


def test_steps_by_a_table_whose_compiler_chooses_no_pointers(monkeypatch):
    monkeypatch.setattr(targets, "FORCED", "cdna3")
    test_steps_equal_the_reference(*SIZES[1], *SHAPES[1], monkeypatch)


@pytest.mark.parametrize("name", ["equal keys", "selected by others", "half precision"])
def test_steps_of_other_kinds(name, monkeypatch):
    few_programs(monkeypatch, 24)
    dtype, tolerance = torch.float32, FLOAT32_TOLERANCE
    if name == "half precision":  # the interpreter multiplies no bfloat16
        dtype, tolerance = torch.bfloat16 if DEVICE == "cuda" else torch.float16, BFLOAT16_TOLERANCE
    starts, total, sizes = [15, 138], 139, (5, 9)
    q, k, v, gates = (each.unflatten(0, (2, total)) for each in inputs(2 * total, 4, 16, dtype))
    queries = None
    if name == "equal keys":  # of equal blocks the first are taken
        k.zero_()
    if name == "selected by others":  # q has two of the four heads that share a KV head
        q, queries, gates = q[:, :, [1, 2, 5, 6]], q, gates[:, :, [1, 2, 5, 6]]
    cache, exact = filled(k, v, starts, 16, total), filled(k, v, starts, 16, total)
    o, expected, _ = step_beside_the_reference((q, k, v, gates), torch.tensor(starts), cache, exact, sizes, queries)
    torch.testing.assert_close(o, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("selected_by", interpreted(["own"], ["own", "others"]))
def test_pieces_equal_one_pass(selected_by, monkeypatch):
    """Through the op, steps in place among them; caches' means are those of one pass bit for bit."""
    monkeypatch.setattr(op, "takes_triton", lambda *_: True)
    pieces = [(40, 1), (1, 15), (24, 70), (1, 1)]
    lengths, sizes = tuple(map(sum, zip(*pieces, strict=True))), (16, 4, 9)
    q, k, v, gates = inputs(sum(lengths), 2, 16)
    queries = q if selected_by == "others" else None
    if queries is not None:
        q, gates = q[:, ::2], gates[:, ::2]
    exact = NSACache.empty(2, HEADS, 16, 16, dtype=torch.float64)
    doubles = [each.double() for each in (q, k, v, gates)]
    scored = q if queries is None else queries
    expected, _ = reference.native_sparse_attention_with_cache(
        *doubles, exact, Sequences.of(lengths), *sizes, scored.double()
    )
    cache = NSACache.empty(2, HEADS, 16, 16, dtype=q.dtype, device=DEVICE)
    for sequences, rows in cut(pieces):
        starts = None if cache.slots == 0 else sequences.starts.to(DEVICE)
        x = [each[rows].to(DEVICE) for each in (q, k, v, gates)]
        with torch.no_grad():
            o, cache = native_sparse_attention_with_cache(
                *x, cache, Sequences.of(sequences.lengths, DEVICE, starts), *sizes, in_place=True,
                queries=None if queries is None else queries[rows].to(DEVICE),
            )  # fmt: skip
        torch.testing.assert_close(o.cpu().double(), expected[rows], rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
    for n, rows in enumerate(documents(lengths)):
        whole = lengths[n] // 16
        means = pool(k[rows][: whole * 16].unflatten(0, (whole, 16)))
        assert torch.equal(cache.pooled_k[n, :, :whole].transpose(0, 1).cpu(), means)


def test_layers_share_the_tiles_of_a_piece(monkeypatch):
    """Once for each length, not for each of three layers and sequences, which would be nine times."""
    made = []
    monkeypatch.setattr(packed_rows, "Tiles", lambda *each: made.append(each[0]) or Tiles(*each))
    lengths = (20, 20, 33)
    q, k, v, gates = (each.to(DEVICE) for each in inputs(6, 2, 16))
    cache = NSACache.empty(3, HEADS, 16, 16, dtype=q.dtype, device=DEVICE).with_room(40)
    cache = NSACache(lengths, cache.room)
    sequences = Sequences.of((2, 2, 2), DEVICE, torch.tensor(lengths, device=DEVICE))
    for _ in range(3):
        triton_prefill.native_sparse_attention_piece(q, k, v, gates, cache, sequences, 16, 4, 9)
    assert made == [16, 16]


def random_cache(lengths, capacity):
    """Of two KV heads of 64, with the means of what it holds."""
    cache = NSACache.empty(len(lengths), HEADS, 64, 64, dtype=torch.bfloat16, device=DEVICE).with_room(capacity)
    for rows, means in zip(cache.room.rows[:2], cache.room.rows[2:], strict=True):
        rows.normal_()
        blocks = rows[:, :, : means.shape[2] * 64].unflatten(2, (-1, 64))
        means.copy_(pool(blocks.flatten(0, 2)).unflatten(0, means.shape[:3]))
    return NSACache(tuple(lengths), cache.room)


def random_inputs(*sizes):
    shapes = [(32, 64), (HEADS, 64), (HEADS, 64), (32, 3)]
    return [torch.randn(*sizes, *shape, device=DEVICE, dtype=torch.bfloat16) for shape in shapes]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_recorded_step_is_the_step():
    """Bit for bit, also where it completes a block."""
    lengths, steps = [0, 62, 5000], 70
    cache, x = random_cache(lengths, 5100), random_inputs(steps, 3)
    other, positions = cache.select([0, 1, 2]), torch.tensor(lengths, device=DEVICE)
    call = triton_decode.native_sparse_attention_step
    outputs = [call(*(each[t] for each in x), cache, positions + t, 16, 512) for t in range(steps)]
    graph, fixed = torch.cuda.CUDAGraph(), [each[0].clone() for each in x]
    with torch.cuda.graph(graph):
        o = call(*fixed, other, positions, 16, 512)
    for t, expected in enumerate(outputs):
        for each, rows in zip(fixed, x, strict=True):
            each.copy_(rows[t])
        graph.replay()
        assert torch.equal(o, expected)
        positions += 1
    assert all(torch.equal(*rows) for rows in zip(cache.room.rows, other.room.rows, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_long_caches_in_bfloat16():
    lengths = [65_000, 65_535, 70]
    cache, x = random_cache(lengths, 65_600), random_inputs(3)
    positions = torch.tensor(lengths, device=DEVICE)
    exact = cache.select([0, 1, 2])
    o = triton_decode.native_sparse_attention_step(*x, cache, positions, 16, 512)
    sequences = Sequences.of((1, 1, 1), DEVICE, positions)
    expected, exact = reference.native_sparse_attention_with_cache(*x, exact, sequences, 64, 16, 512)
    torch.testing.assert_close(o, expected, rtol=BFLOAT16_TOLERANCE, atol=BFLOAT16_TOLERANCE)
    for found, rows in zip(cache.room.rows[2:], exact.room.rows[2:], strict=True):
        assert torch.equal(found[1, :, 1023], rows[1, :, 1023])
