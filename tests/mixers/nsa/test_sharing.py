"""Selection by query heads that several ranks have."""

import pytest
import torch

from megahybrid.mixers.nsa.sharing import shares
from tools.workers import Workers

BLOCK, BLOCKS, HEADS, KV_HEADS, HEAD_DIM = 16, 4, 8, 2, 8
LENGTHS = [[131, 3, 70], [64, 1, 65], [200], [5, 64]]


@pytest.fixture(scope="module")
def workers():
    pool = Workers(4)
    yield pool
    pool.close()


def inputs(lengths):
    generator = torch.Generator().manual_seed(len(lengths))
    q = torch.randn(sum(lengths), HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
    return q, torch.randn(sum(lengths), KV_HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)


def of_a_rank(lengths):
    """What this rank selects, its number of KV heads, and how many queries it sees all heads of."""
    from megahybrid.config.schema import ParallelConfig
    from megahybrid.mixers.nsa import sharing
    from megahybrid.parallel import groups
    from megahybrid_kernels import Sequences

    groups.initialize(ParallelConfig(tensor=4))
    (q, k), rank, scored = inputs(lengths), groups.tensor_parallel()[0], []
    mine = q.chunk(4, 1)[rank].requires_grad_(), k[:, rank // 2][:, None]
    real = sharing.select_blocks

    def select_blocks(q, *arguments):
        scored.append(q.shape)
        return real(q, *arguments)

    sharing.select_blocks = select_blocks
    try:
        selection = sharing.select_together(*mine, Sequences.of(lengths), BLOCK, BLOCKS, 2)
        return selection, sharing.all_queries(mine[0].detach(), 2), scored
    finally:
        sharing.select_blocks = real


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_ranks_select_together_what_one_selects(lengths, workers):
    from megahybrid_kernels import Sequences
    from megahybrid_kernels.native_sparse_attention import select_blocks

    q, k = inputs(lengths)
    expected = select_blocks(q, k, Sequences.of(lengths), BLOCK, BLOCKS)
    ranks = workers.run(4, "tests.mixers.nsa.test_sharing:of_a_rank", lengths)
    for rank, (selection, queries, scored) in enumerate(ranks):
        assert torch.equal(queries, q.chunk(2, 1)[rank // 2])
        if max(lengths) <= BLOCK * BLOCKS:
            assert selection is None and not scored
        else:
            assert torch.equal(selection, expected[:, rank // 2][:, None])
            assert [shape[1:] for shape in scored] == [(HEADS // KV_HEADS, HEAD_DIM)]
    if all(scored for _, _, scored in ranks):
        assert sum(scored[0][0] for _, _, scored in ranks) == KV_HEADS * sum(lengths)


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
