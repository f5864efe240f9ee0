"""Decoding with the Triton kernels: on a GPU where there is one, else on Triton's interpreter."""

import pytest
import torch
from cases import interpreted
from oracles_lte import FLOAT32_TOLERANCE

from megahybrid_kernels import NSACache, Sequences
from megahybrid_kernels.native_sparse_attention import reference, triton_decode
from megahybrid_kernels.native_sparse_attention.pooling import pool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = 2


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


SIZES = [(16, 4, 9), (16, 3, 40), (32, 6, 1), (64, 5, 64)]
# Query heads of a KV head, head dim, programs that are wished for.
SHAPES = [(3, 16, 24), (1, 8, 1), (16, 24, 60)]
FEW = {(*sizes, *SHAPES[n % 3]) for n, sizes in enumerate(SIZES)}
EVERY = [(*sizes, *shape) for sizes in SIZES for shape in SHAPES]


def step_beside_the_reference(x, new, cache, exact, num_blocks, window_size, queries=None):
    """Outputs of the step, in float64, and of the reference, and the reference's cache. x: `[sequences, tokens, …]`."""
    rows = [each[torch.arange(len(new)), new].to(DEVICE) for each in x]
    positions, scored = new.to(DEVICE), None
    if queries is not None:
        scored = queries[torch.arange(len(new)), new].to(DEVICE)
    o = triton_decode.native_sparse_attention_step(*rows, cache, positions, num_blocks, window_size, scored)
    doubles = [each.double() for each in (*rows, rows[0] if scored is None else scored)]
    sequences = Sequences.of((1,) * len(new), DEVICE, positions)
    sizes = (cache.block_size, num_blocks, window_size)
    expected, exact = reference.native_sparse_attention_with_cache(*doubles[:4], exact, sequences, *sizes, doubles[4])
    return o.double(), expected, exact


@pytest.mark.parametrize("block_size, num_blocks, window_size, groups, dim, programs", interpreted(FEW, EVERY))
def test_steps_equal_the_reference(block_size, num_blocks, window_size, groups, dim, programs, monkeypatch):
    """From a first token, and over blocks' ends; each step twice, bit for bit the same."""
    for name, value in {"_SLOTS": 16, "_PROGRAMS": programs, "_SELECTED_PROGRAMS": programs, "_LOGITS": 64}.items():
        monkeypatch.setattr(triton_decode, name, value)
    starts, steps = [0, block_size - 1, 9 * block_size - 2], 3
    total = max(starts) + steps
    x = [each.unflatten(0, (3, total)) for each in inputs(3 * total, groups, dim)]
    cache = filled(x[1], x[2], starts, block_size, total + 3)
    exact = filled(x[1].double(), x[2].double(), starts, block_size, total + 3)
    for step in range(steps):
        new = torch.tensor(starts) + step
        o, expected, after = step_beside_the_reference(x, new, cache, exact, num_blocks, window_size)
        again = step_beside_the_reference(x, new, cache, exact, num_blocks, window_size)[0]
        torch.testing.assert_close(o, expected, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
        assert torch.equal(o, again)
        exact = after
    wanted = filled(x[1], x[2], [start + steps for start in starts], block_size, total + 3)
    for found, rows in zip(cache.room.rows, wanted.room.rows, strict=True):
        assert torch.equal(found.nan_to_num(), rows.nan_to_num())
