from contextlib import nullcontext

import pytest
import torch
from oracles_lte import (
    BFLOAT16_TOLERANCE,
    FLOAT32_TOLERANCE,
    FLOAT64_TOLERANCE,
    assert_same_gradients,
    cut,
    documents,
    leaf,
)
from oracles_nsa import flipped, near_selection, oracle_attention, oracle_selection

from megahybrid_kernels import (
    NSACache,
    Sequences,
    native_sparse_attention,
    native_sparse_attention_with_cache,
    select_blocks,
)
from megahybrid_kernels.native_sparse_attention.limits import MOST_BLOCKS

TOLERANCES = {torch.float32: FLOAT32_TOLERANCE, torch.bfloat16: BFLOAT16_TOLERANCE}


def inputs(lengths, query_heads=6, heads=2, head_dim=8, dtype=torch.float64):
    shapes = {
        "q": (query_heads, head_dim),
        "k": (heads, head_dim),
        "v": (heads, head_dim),
        "gates": (query_heads, 3),
    }
    pairs = {name: leaf(sum(lengths), *shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
    for gates in pairs["gates"]:
        gates.data.abs_()
    return pairs


def first(pairs):
    return [pair[0].detach() for pair in pairs.values()]


def check(pairs, lengths, block_size, num_blocks, window_size, tolerance=FLOAT64_TOLERANCE):
    """Output and gradients under the selection that the op makes, which is returned."""
    actual, exact = zip(*pairs.values(), strict=True)
    sizes = (block_size, num_blocks, window_size)
    o, selection = native_sparse_attention(*actual, Sequences.of(lengths), *sizes)
    assert o.dtype == actual[0].dtype
    expected = oracle_attention(*exact, selection, lengths, block_size, window_size)
    assert_same_gradients(o, expected, pairs, tolerance)
    with torch.no_grad():
        repeated, _ = native_sparse_attention(*actual, Sequences.of(lengths), *sizes, selection)
    assert torch.equal(repeated, o)
    return selection


@pytest.mark.parametrize("block_size, num_blocks, window_size", [(4, 4, 9), (16, 3, 20), (1, 6, 1)])
@pytest.mark.parametrize("lengths", [(1,), (3, 1, 2, 40, 9), (90,)])
def test_selection_outputs_and_gradients(lengths, block_size, num_blocks, window_size):
    pairs = inputs(lengths)
    selection = check(pairs, lengths, block_size, num_blocks, window_size)
    assert selection.dtype == torch.int32
    assert torch.equal(selection, oracle_selection(*first(pairs)[:2], lengths, block_size, num_blocks))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 63, 64, 65, 79, 80, 95, 96])
def test_lengths_beside_borders(length):
    pairs = inputs((length,), query_heads=2, heads=1)
    selection = check(pairs, (length,), 16, 4, 24)
    assert torch.equal(selection, oracle_selection(*first(pairs)[:2], (length,), 16, 4))


def test_lengths_beside_borders_of_a_model():
    lengths, sizes = (1, 63, 64, 65, 127, 128, 1023, 1024, 1025, 1087, 1088), (64, 16, 512)
    pairs = inputs(lengths, query_heads=2, heads=1)
    actual, exact = zip(*pairs.values(), strict=True)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    tokens = sorted({end - back for end, length in zip(ends, lengths, strict=True) for back in (1, 64, length)} - {-63})
    o, selection = native_sparse_attention(*actual, Sequences.of(lengths), *sizes)
    assert torch.equal(selection[tokens], oracle_selection(*first(pairs)[:2], lengths, *sizes[:2], tokens))
    expected = oracle_attention(*exact, selection, lengths, sizes[0], sizes[2], tokens)
    assert_same_gradients(o[tokens], expected, pairs, FLOAT64_TOLERANCE)


@pytest.mark.parametrize("branch", range(3))
def test_each_branch_alone(branch):
    pairs = inputs((70, 3))
    for each in pairs["gates"]:
        each.data.zero_()[..., branch] = 1
    check(pairs, (70, 3), 4, 5, 9)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_lower_precision(dtype):
    check(inputs((70, 3), dtype=dtype), (70, 3), 4, 5, 9, TOLERANCES[dtype])


def test_gradients_are_finite_differences():
    sequences, sizes = Sequences.of((11, 4)), (2, 3, 3)
    leaves = [pair[0] for pair in inputs((11, 4), query_heads=2, heads=1, head_dim=3).values()]
    selection = select_blocks(*leaves[:2], sequences, *sizes[:2])
    assert torch.autograd.gradcheck(
        lambda *x: native_sparse_attention(*x, sequences, *sizes, selection)[0], leaves, fast_mode=True
    )


def test_packed_equals_separate():
    lengths = (131, 1, 290, 64)
    q, k, v, gates = first(inputs(lengths))
    whole, selection = native_sparse_attention(q, k, v, gates, Sequences.of(lengths), 4, 8, 9)
    for rows in documents(lengths):
        alone = [x[rows] for x in (q, k, v, gates)]
        o, own = native_sparse_attention(*alone, Sequences.of([rows.stop - rows.start]), 4, 8, 9)
        assert torch.equal(own, selection[rows])
        torch.testing.assert_close(o, whole[rows], rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_later_changes_no_bit(dtype):
    lengths, sizes = (150, 60), (4, 6, 9)
    tensors = first(inputs(lengths, dtype=dtype))
    o, selection = native_sparse_attention(*tensors, Sequences.of(lengths), *sizes)
    # The border of a block, of a block of queries, of the documents.
    for row in (3, 4, 74, 75, 99, 149, 150, 209):
        changed = [torch.cat([x[:row], 30 * torch.randn_like(x[row:])]) for x in tensors]
        changed[3].abs_()
        other, others = native_sparse_attention(*changed, Sequences.of(lengths), *sizes)
        assert torch.equal(other[:row], o[:row]) and torch.equal(others[:row], selection[:row])
        assert not torch.equal(other[row:], o[row:])


def test_documents_of_one_token():
    lengths = (1,) * 300
    pairs = inputs(lengths)
    leaves = [pair[0] for pair in pairs.values()]
    o, selection = native_sparse_attention(*leaves, Sequences.of(lengths), 64, 16, 512)
    assert (selection == torch.tensor([0] + [-1] * 15)).all()
    _, _, v, gates = leaves
    expected = gates[..., 1:].sum(-1, keepdim=True) * v.repeat_interleave(3, 1)
    torch.testing.assert_close(o, expected)
    dq, dk, dv, dgates = torch.autograd.grad(o.sum(), leaves)
    assert torch.equal(dgates[..., 0], torch.zeros(300, 6, dtype=o.dtype))
    # Of one key there is nothing to choose.
    torch.testing.assert_close((dq, dk), (torch.zeros_like(dq), torch.zeros_like(dk)))
    torch.testing.assert_close(dv.sum(), 8 * gates[..., 1:].sum())


def test_a_block_that_nobody_chose_has_no_gradient():
    lengths, (block_size, num_blocks) = (96,), (4, 3)
    q, k, v, gates = (pair[0] for pair in inputs(lengths).values())
    gates = torch.zeros_like(gates)
    gates[90:, :, 1] = 1
    o, selection = native_sparse_attention(q, k, v, gates, Sequences.of(lengths), block_size, num_blocks, 9)
    seen = {n * block_size + j for n in selection[90:].unique().tolist() for j in range(block_size)}
    assert len(seen) < 90
    for gradient in torch.autograd.grad(o.square().sum(), (k, v)):
        assert [bool(row.any()) for row in gradient] == [j in seen for j in range(96)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim, query_heads, heads", [(8, 6, 2), (64, 16, 1), (33, 3, 3)])
def test_of_equal_blocks_the_first_are_chosen(head_dim, query_heads, heads, dtype):
    tokens, block_size, num_blocks = 700, 16, 6
    q = leaf(tokens, query_heads, head_dim, seed=0, dtype=dtype)[0]
    k = leaf(1, heads, head_dim, seed=1, dtype=dtype)[0].expand(tokens, -1, -1)
    selection = select_blocks(q, k, Sequences.of([tokens]), block_size, num_blocks)
    for t in range(tokens):
        c = t // block_size
        expected = [0, 1, 2, 3, c - 1, c] if c >= num_blocks else [n if n <= c else -1 for n in range(num_blocks)]
        assert selection[t].tolist() == [expected] * heads, t


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, FLOAT64_TOLERANCE), (torch.float32, 1e-3)])
def test_logits_of_10000(dtype, tolerance):
    """Probabilities of exactly 0: such blocks are chosen nevertheless, the first ones first. In float32 the softmax's
    statistics, from which the backward pass takes its probabilities, are 1e-3 apart at 10,000."""
    lengths, (block_size, num_blocks, window_size) = (90, 5), (4, 6, 9)
    pairs = inputs(lengths, head_dim=16, dtype=dtype)
    signs = torch.randint(2, (95, 2), generator=torch.Generator().manual_seed(3)) * 2.0 - 1
    for q, k in zip(pairs["q"], pairs["k"], strict=True):
        q.data.zero_()[..., 0] = torch.tensor([1, -1, 0.5, 1, 1, 0])
        k.data.zero_()[..., 0] = 4e4 * signs
    selection = check(pairs, lengths, block_size, num_blocks, window_size, tolerance)
    assert torch.equal(selection, oracle_selection(*first(pairs)[:2], lengths, block_size, num_blocks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selection_by_margin(dtype):
    """By float64 scores of the same inputs."""
    lengths, block_size, num_blocks = (700, 300), 8, 16
    q, k, *_ = first(inputs(lengths, query_heads=32, dtype=dtype))
    tokens = list(range(200, 1000, 7))
    selection = select_blocks(q, k, Sequences.of(lengths), block_size, num_blocks)
    assert flipped(selection, q, k, lengths, block_size, tokens) <= 1e-3 * 2 * len(tokens)


def test_rows_alone_choose_as_among_all():
    lengths = (3, 1, 2, 40, 9, 131)
    q, k, *_ = first(inputs(lengths))
    whole = select_blocks(q, k, Sequences.of(lengths), 4, 4)
    for begin, end in ((0, 20), (20, 21), (21, sum(lengths))):
        part = select_blocks(q[begin:end], k, Sequences.of(lengths), 4, 4, (begin, end))
        assert torch.equal(part, whole[begin:end])


def test_a_given_selection_is_used():
    lengths, sizes = (60,), (4, 4, 5)
    pairs = inputs(lengths)
    selection = near_selection(60, 2, 4, 7, 3)
    o, same = native_sparse_attention(*(p[0] for p in pairs.values()), Sequences.of(lengths), *sizes, selection)
    assert same is selection
    expected = oracle_attention(*(p[1] for p in pairs.values()), selection, lengths, 4, 5)
    assert_same_gradients(o, expected, pairs, FLOAT64_TOLERANCE)


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"q": torch.zeros(5, 3, 8)}, "fit together"),
        ({"v": torch.zeros(5, 1, 8)}, "fit together"),
        ({"gates": torch.zeros(5, 2, 2)}, "fit together"),
        ({"k": torch.zeros(4, 2, 8)}, "tokens"),
        ({"q": torch.zeros(4, 2, 8)}, "rows 0 to 5"),
        ({"block_size": 0}, "block_size"),
        ({"num_blocks": 2}, "forced"),
        ({"num_blocks": MOST_BLOCKS + 1}, "to 64"),
        ({"window_size": 0}, "window_size"),
        ({"selection": torch.zeros(5, 2, 3)}, "int32"),
        ({"selection": torch.zeros(5, 2, 4, dtype=torch.int32)}, "int32"),
        ({"gates": torch.full((5, 2, 3), -1e-9)}, "negative"),
    ],
)
def test_refuses_what_does_not_fit(changed, match):
    fitting = {name: torch.zeros(5, 2, 8) for name in "qkv"} | {"gates": torch.zeros(5, 2, 3)}
    fitting |= {"sequences": Sequences.of([5]), "block_size": 4, "num_blocks": 3, "window_size": 2}
    with pytest.raises(ValueError, match=match):
        native_sparse_attention(**fitting | changed)


@pytest.mark.parametrize(
    "listed", [[0, 2, -1], [1, 2, -1], [0, 1, 2], [-1, 1, 2], [1, -1, 2], [2, 1, -1], [1, 1, 2], [1, 2, 3], [0, 1, -1]]
)
def test_a_selection_has_its_form_and_near_blocks(listed):
    """Of the last token, whose block is the third."""
    selection = near_selection(9, 2, 4, 2)
    selection[-1, 1] = torch.tensor(listed)
    allowed = listed in ([1, 2, -1], [0, 1, 2])
    with nullcontext() if allowed else pytest.raises(ValueError, match="ascending"):
        tensors = (torch.zeros(9, 2, n) for n in (8, 8, 8, 3))
        native_sparse_attention(*tensors, Sequences.of([9]), 4, 3, 2, selection)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_gpu():
    """In training, selecting for some rows alone, a first piece, a later one and a step."""
    lengths, sizes = (131, 33, 290), (16, 4, 40)
    sequences = Sequences.of(lengths, "cuda")
    q, k, v, gates = (x.cuda().requires_grad_() for x in first(inputs(lengths, head_dim=16, dtype=torch.float32)))
    pieces = [
        (Sequences.of(each.lengths, "cuda", each.starts.cuda() if n else None), rows.cuda())
        for n, (each, rows) in enumerate(cut([(100, 20, 200), (30, 12, 89), (1, 1, 1)]))
    ]
    caches = [NSACache.empty(3, 2, 16, 16, dtype=q.dtype, device="cuda") for _ in range(2)]
    outputs = []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        o, selection = native_sparse_attention(q, k, v, gates, sequences, *sizes)
        native_sparse_attention(q, k, v, gates, sequences, *sizes, selection)[0].sum().backward()
        some = select_blocks(q[90:400], k, sequences, *sizes[:2], (90, 400))
        with torch.no_grad():
            for scored, cache in zip((None, q), caches, strict=True):
                for each, rows in pieces:
                    x, queries = (y[rows] for y in (q, k, v, gates)), None if scored is None else scored[rows]
                    part, cache = native_sparse_attention_with_cache(
                        *x, cache, each, *sizes, in_place=True, queries=queries
                    )
                    outputs.append((part, rows))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(some, selection[90:400])
    for part, rows in outputs:
        torch.testing.assert_close(part, o[rows], rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
