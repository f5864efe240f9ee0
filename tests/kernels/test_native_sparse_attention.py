import pytest
import torch
from oracles_lte import FLOAT64_TOLERANCE, assert_same_gradients, leaf
from oracles_nsa import oracle_attention, oracle_selection

from megahybrid_kernels import Sequences, native_sparse_attention, select_blocks


def inputs(lengths, query_heads, heads, dtype=torch.float64):
    tokens = sum(lengths)
    shapes = {"q": (query_heads, 8), "k": (heads, 8), "v": (heads, 8), "gates": (query_heads, 3)}
    return {name: leaf(tokens, *shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("block_size, num_blocks, window_size", [(4, 4, 9), (16, 3, 20), (1, 6, 1)])
@pytest.mark.parametrize("lengths", [(1,), (3, 1, 2, 40, 9), (90,)])
def test_selection_outputs_and_gradients(lengths, block_size, num_blocks, window_size):
    pairs = inputs(lengths, 6, 2)
    q, k, v, gates = (pair[0] for pair in pairs.values())
    o, selection = native_sparse_attention(q, k, v, gates, Sequences.of(lengths), block_size, num_blocks, window_size)
    expected = oracle_selection(q.detach(), k.detach(), lengths, block_size, num_blocks)
    assert selection.dtype == torch.int32 and torch.equal(selection, expected)
    expected = oracle_attention(*(pair[1] for pair in pairs.values()), selection, lengths, block_size, window_size)
    assert_same_gradients(o, expected, pairs, FLOAT64_TOLERANCE)


def test_rows_alone_choose_as_among_all():
    lengths = (3, 1, 2, 40, 9, 131)
    q, k, *_ = (pair[0] for pair in inputs(lengths, 6, 2).values())
    whole = select_blocks(q, k, Sequences.of(lengths), 4, 4)
    for first, end in ((0, 20), (20, 21), (21, sum(lengths))):
        assert torch.equal(select_blocks(q[first:end], k, Sequences.of(lengths), 4, 4, (first, end)), whole[first:end])
