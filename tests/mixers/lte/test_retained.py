"""What is retained at the borders of context parallel ranks, with many like scores, against ranking all tokens."""

import pytest
import torch

from megahybrid.config.schema import ParallelConfig
from megahybrid.mixers.lte import LTEConfig
from megahybrid.parallel import groups

HEADS, TOKENS, RANKS = 2, 20, 4
LTE = LTEConfig(window_size=6, buffer_size=5, sink_size=2, train_cap=True)


def scores():
    """Of -2, 0, 1 and 2; -1 is a blank's."""
    drawn = torch.randint(4, (RANKS * TOKENS, HEADS), generator=torch.Generator().manual_seed(0))
    return torch.tensor([-2.0, 0.0, 1.0, 2.0], dtype=torch.float64)[drawn]


def found(lengths):
    """This rank's first token, and the numbers of the tokens that it finds retained, by head."""
    from megahybrid.mixers.lte.retained import Rows, retained, rows_seen
    from megahybrid.parallel import tokens
    from megahybrid_kernels import Sequences

    groups.initialize(ParallelConfig(context=RANKS))
    rank, _ = groups.context_parallel()
    sequences = Sequences.of(lengths)
    own = slice(rank * TOKENS, (rank + 1) * TOKENS)
    numbers = torch.arange(RANKS * TOKENS).double()[own, None, None].expand(-1, HEADS, 4)
    borrowed = tokens.borrow(rows_seen(sequences, LTE), numbers, -numbers)
    (score,) = tokens.borrow(rows_seen(sequences, LTE), scores()[own])
    rows = Rows(*(each.joined() for each in (*borrowed, score)))
    _, kept = retained(torch.zeros(1), rows, sequences, LTE)
    if kept is None:
        return own.start, None
    assert torch.equal(kept.k, -kept.v)
    heads = zip(kept.k[..., 0].T, kept.score.T, strict=True)
    return own.start, [head[score != -1].int().tolist() for head, score in heads]


@pytest.mark.parametrize("lengths", [(80,), (3, 77), (17, 2, 61), (30, 50)], ids=str)
def test_the_best_of_all_are_retained(lengths, workers):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    for start, kept in workers.run(RANKS, "tests.mixers.lte.test_retained:found", lengths):
        begin = max([0, *(end for end in ends if end <= start)])
        if start - begin <= LTE.window_size + LTE.buffer_size:
            assert kept is None
            continue
        for head, numbers in enumerate(kept):
            merit = scores()[:, head].tolist()
            merit[begin : begin + LTE.sink_size] = [torch.inf] * LTE.sink_size
            left = [number for number in range(begin, start - LTE.window_size) if merit[number] > 0]
            assert numbers == sorted(left, key=lambda number: -merit[number])[: LTE.buffer_size]
