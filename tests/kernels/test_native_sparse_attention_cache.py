import pytest
import torch
from oracles_lte import FLOAT64_TOLERANCE, assert_same_gradients, cut, documents, leaf, random_pieces
from oracles_nsa import oracle_attention, oracle_selection

from megahybrid_kernels import NSACache, Sequences, native_sparse_attention_with_cache
from megahybrid_kernels.native_sparse_attention.pooling import pool

HEADS, DIM = 2, 8


def inputs(tokens, query_heads=4, dtype=torch.float64):
    shapes = {"q": (query_heads, DIM), "k": (HEADS, DIM), "v": (HEADS, DIM), "gates": (query_heads, 3)}
    return {name: leaf(tokens, *shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}


def oracle(q, k, v, gates, lengths, block_size, num_blocks, window_size, queries=None):
    selection = oracle_selection(q if queries is None else queries, k, lengths, block_size, num_blocks)
    return oracle_attention(q, k, v, gates, selection, lengths, block_size, window_size)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE)


def at_borders(block_size):
    """Pieces of three sequences that end one token before, at and after blocks' ends, also several at once."""
    b = block_size
    pieces = [(b - 1, b, b + 1), (1, 1, 1), (1, b - 1, 1), (1, 1, 1), (2 * b, 1, 3 * b - 3), (1, 1, 1), (b, 5 * b, 1)]
    return [*pieces, (1, 1, 1), (1, 1, 1)]


SIZES = [(4, 4, 9), (16, 3, 20), (1, 6, 1)]


@pytest.mark.parametrize("block_size, num_blocks, window_size", SIZES)
@pytest.mark.parametrize("borders", [False, True])
def test_pieces_equal_one_pass(block_size, num_blocks, window_size, borders):
    """An output would differ if only one selected block did."""
    pieces = at_borders(max(block_size, 3)) if borders else random_pieces(count=3, rounds=14, seed=1)
    lengths = tuple(map(sum, zip(*pieces, strict=True)))
    x = [pair[1].detach() for pair in inputs(sum(lengths)).values()]
    sizes = (block_size, num_blocks, window_size)
    expected = oracle(*x, lengths, *sizes)
    cache = NSACache.empty(3, HEADS, DIM, block_size, dtype=torch.float64)
    for sequences, rows in cut(pieces):
        outputs = []
        for use in (rows, rows.flip(0), rows):  # what a cache is asked for must not change what it answers next
            o, new = native_sparse_attention_with_cache(*(each[use] for each in x), cache, sequences, *sizes)
            outputs.append(o)
        close(o, expected[rows])
        assert torch.equal(outputs[0], outputs[2])
        cache = new
    assert cache.lengths == lengths


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_do_not_depend_on_the_pieces(block_size, dtype):
    """Bit for bit; nor do those of an older cache change."""
    pieces = at_borders(block_size)
    lengths = tuple(map(sum, zip(*pieces, strict=True)))
    x = [pair[0].detach() for pair in inputs(sum(lengths), 2, dtype).values()]
    cache, older = NSACache.empty(3, HEADS, DIM, block_size, dtype=dtype), []
    for sequences, rows in cut(pieces):
        older.append((cache, cache.pooled_k.clone()))
        _, cache = native_sparse_attention_with_cache(*(each[rows] for each in x), cache, sequences, block_size, 3, 9)
    for n, rows in enumerate(documents(lengths)):
        complete = lengths[n] // block_size
        for memory, found in zip(x[1:3], (cache.pooled_k, cache.pooled_v), strict=True):
            whole = memory[rows][: complete * block_size].unflatten(0, (complete, block_size))
            assert torch.equal(found[n, :, :complete].transpose(0, 1), pool(whole))
            mean = whole.double().mean(1)
            torch.testing.assert_close(pool(whole).double(), mean, rtol=torch.finfo(dtype).eps, atol=1e-6)
    for each, means in older:
        for n, length in enumerate(each.lengths):
            complete = length // block_size
            assert torch.equal(each.pooled_k[n, :, :complete], means[n, :, :complete])


def test_selected_and_joined_caches_go_on():
    sizes, first, more = (4, 4, 9), (61, 3, 30), (7, 5, 1)
    lengths = tuple(a + b for a, b in zip(first, more, strict=True))
    x = [pair[1].detach() for pair in inputs(sum(lengths)).values()]
    expected = oracle(*x, lengths, *sizes)
    (sequences, rows), (later, new_rows) = cut([first, more])
    empty = NSACache.empty(3, HEADS, DIM, 4, dtype=torch.float64)
    _, cache = native_sparse_attention_with_cache(*(each[rows] for each in x), empty, sequences, *sizes)
    assert cache.bytes_of(64) == 3 * HEADS * DIM * 8 * 2 * (64 + 16)
    order = [2, 0, 1]
    cache = cache.select([2]).join(cache.select([0, 1]))
    rows = torch.cat([new_rows[later.borders[n] : later.borders[n + 1]] for n in order])
    again = Sequences.of([more[n] for n in order], starts=torch.tensor([first[n] for n in order]))
    for _ in range(2):
        o, after = native_sparse_attention_with_cache(*(each[rows] for each in x), cache, again, *sizes)
        close(o, expected[rows])
        assert after.lengths == tuple(lengths[n] for n in order)
        cache = cache.with_room(500)
        assert cache.capacity >= 500 and cache.room.rows[2].shape[2] == cache.capacity // 4


def test_blocks_are_selected_by_all_query_heads():
    """q has two of the four heads that share each KV head."""
    lengths, sizes = (70, 41), (4, 4, 9)
    q, k, v, gates = (pair[1].detach() for pair in inputs(sum(lengths), 8).values())
    own = [0, 1, 4, 5]
    expected = oracle(q, k, v, gates, lengths, *sizes)[:, own]
    other = oracle(q[:, own], k, v, gates[:, own], lengths, *sizes)
    assert (expected - other).abs().max() > 0.01
    cache = NSACache.empty(2, HEADS, DIM, 4, dtype=torch.float64)
    for sequences, rows in cut([(40, 38), (29, 2), (1, 1)]):
        o, cache = native_sparse_attention_with_cache(
            q[rows][:, own], k[rows], v[rows], gates[rows][:, own], cache, sequences, *sizes, queries=q[rows]
        )
        close(o, expected[rows])


def test_gradients_through_the_cache():
    lengths, sizes = (40, 3, 90), (4, 4, 9)
    pairs = inputs(sum(lengths))
    cache = NSACache.empty(3, HEADS, DIM, 4, dtype=torch.float64)
    o, _ = native_sparse_attention_with_cache(
        *(pair[0] for pair in pairs.values()), cache, Sequences.of(lengths), *sizes
    )
    expected = oracle(*(pair[1] for pair in pairs.values()), lengths, *sizes)
    assert_same_gradients(o, expected, pairs, FLOAT64_TOLERANCE)


def test_refuses_a_cache_of_something_else():
    q, k, v, gates = (pair[0] for pair in inputs(5).values())
    for count, block_size in ((2, 4), (1, 8)):
        cache = NSACache.empty(count, HEADS, DIM, block_size, dtype=q.dtype)
        with pytest.raises(ValueError, match=f"the cache holds {count} sequences in blocks of {block_size}, but 1 in"):
            native_sparse_attention_with_cache(q, k, v, gates, cache, Sequences.of([5]), 4, 4, 9)
