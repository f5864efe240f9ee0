"""Selection by query heads that several ranks have."""

import pytest
import torch

from megahybrid.mixers.nsa.sharing import shares

BLOCK, BLOCKS, HEADS, KV_HEADS, HEAD_DIM = 16, 4, 8, 2, 8
LENGTHS = [[131, 3, 70], [64, 1, 65], [200], [5, 64]]


def inputs(lengths):
    generator = torch.Generator().manual_seed(len(lengths))
    q = torch.randn(sum(lengths), HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
    return q, torch.randn(sum(lengths), KV_HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)


def of_a_rank(lengths, layout, kv_heads):
    """What this rank selects, its number of KV heads, and how many queries it sees all heads of."""
    from megahybrid.config.schema import ParallelConfig
    from megahybrid.mixers.nsa import sharing
    from megahybrid.parallel import groups
    from megahybrid_kernels import Sequences

    groups.initialize(ParallelConfig(**layout))
    (q, k), (rank, ranks), scored = inputs(lengths), groups.head_parallel(), []
    sharers = ranks // kv_heads
    mine = q.chunk(4, 1)[rank].requires_grad_(), k[:, rank // sharers][:, None]
    real = sharing.select_blocks

    def select_blocks(q, *arguments):
        scored.append(q.shape)
        return real(q, *arguments)

    sharing.select_blocks = select_blocks
    try:
        selection = sharing.select_together(*mine, Sequences.of(lengths), BLOCK, BLOCKS, sharers)
        return rank, selection, sharing.all_queries(mine[0].detach(), sharers), scored
    finally:
        sharing.select_blocks = real


@pytest.mark.parametrize(
    ("lengths", "layout", "kv_heads"),
    [
        *((lengths, {"tensor": 4}, KV_HEADS) for lengths in LENGTHS),
        (LENGTHS[0], {"context": 4}, KV_HEADS),
        (LENGTHS[0], {"tensor": 2, "context": 2}, KV_HEADS),
        (LENGTHS[0], {"tensor": 2, "context": 2}, 1),
    ],
    ids=str,
)
def test_ranks_select_together_what_one_selects(lengths, layout, kv_heads, workers):
    from megahybrid_kernels import Sequences
    from megahybrid_kernels.native_sparse_attention import select_blocks

    (q, k), sharers = inputs(lengths), 4 // kv_heads
    expected = select_blocks(q, k[:, :kv_heads], Sequences.of(lengths), BLOCK, BLOCKS)
    ranks = workers.run(4, "tests.mixers.nsa.test_sharing:of_a_rank", lengths, layout, kv_heads)
    for rank, selection, queries, scored in ranks:
        if "context" not in layout:  # states are not split by tokens
            assert torch.equal(queries, q.chunk(kv_heads, 1)[rank // sharers])
        if max(lengths) <= BLOCK * BLOCKS:
            assert selection is None and not scored
        else:
            assert torch.equal(selection, expected[:, rank // sharers][:, None])
            assert [shape[1:] for shape in scored] == [(HEADS // kv_heads, HEAD_DIM)]
    if all(scored for *_, scored in ranks):
        assert sum(scored[0][0] for *_, scored in ranks) == kv_heads * sum(lengths)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("lengths", [[65536], [4096] * 8, [1000] * 20 + [9000, 30000], [65, 1, 2]], ids=str)
def test_ranks_take_equally_long(lengths, ranks):
    every = 64 if max(lengths) < 1024 else 1024
    borders = shares(lengths, every, ranks)
    ends = torch.tensor(borders[1:])
    cost = torch.cat([torch.arange(n) if n > every else torch.zeros(n, dtype=torch.int64) for n in lengths]).cumsum(0)
    due = cost[-1] * torch.arange(1, ranks + 1) / ranks
    assert borders[0] == 0 and borders[-1] == sum(lengths) and len(set(borders)) == ranks + 1
    assert ((cost[ends - 1] - due).abs() <= max(lengths)).all()
