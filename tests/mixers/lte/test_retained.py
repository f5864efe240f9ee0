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


def found(lengths, room, capped):
    """This rank's first token, the numbers of the tokens that it finds retained, and how many of its own it has not
    passed on, by head."""
    from megahybrid.mixers.lte.retained import Rows, retained, rows_seen
    from megahybrid.parallel import tokens
    from megahybrid_kernels import Sequences

    groups.initialize(ParallelConfig(context=RANKS))
    rank, _ = groups.context_parallel()
    sequences = Sequences.of(lengths)
    own = slice(rank * TOKENS, (rank + 1) * TOKENS)
    numbers = torch.arange(RANKS * TOKENS).double()[own, None, None].expand(-1, HEADS, 4)
    borrowed = tokens.borrow(rows_seen(sequences, LTE, room), numbers, -numbers)
    (score,) = tokens.borrow(rows_seen(sequences, LTE, room), scores()[own])
    rows = Rows(*(each.joined() for each in (*borrowed, score)))
    _, kept, missing = retained(rows, len(score.before), sequences, LTE, room, capped)
    if kept is None:
        return own.start, None, missing.tolist()
    assert torch.equal(kept.k, -kept.v)
    heads = zip(kept.k[..., 0].T, kept.score.T, strict=True)
    return own.start, [head[score != -1].int().tolist() for head, score in heads], missing.tolist()


def merits(begin):
    """By head, of all tokens, where a document begins at this one."""
    merit = scores().T.clone()
    merit[:, begin : begin + LTE.sink_size] = torch.inf
    return merit.tolist()


@pytest.mark.parametrize("lengths", [(80,), (3, 77), (17, 2, 61), (30, 50)], ids=str)
def test_the_best_of_all_are_retained(lengths, workers):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    for start, kept, missing in workers.run(RANKS, "tests.mixers.lte.test_retained:found", lengths, 5, True):
        begin = max([0, *(end for end in ends if end <= start)])
        assert missing == [0] * HEADS
        if start - begin <= LTE.window_size + LTE.buffer_size:
            assert kept is None
            continue
        for numbers, merit in zip(kept, merits(begin), strict=True):
            left = [number for number in range(begin, start - LTE.window_size) if merit[number] > 0]
            assert numbers == sorted(left, key=lambda number: -merit[number])[: LTE.buffer_size]


@pytest.mark.parametrize("room", [20, 13, 7, 2])
@pytest.mark.parametrize(
    "lengths", [(80,), (3, 77), (15, 65), (13, 67), (17, 2, 61), (30, 50), (53, 27), (20, 60)], ids=str
)
def test_without_a_cap_all_are_retained_or_missed(lengths, room, workers):
    """Sinks first; and what is missed is counted where it was left out, if a later rank wants it."""
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    window, wanting, missed = LTE.window_size, {}, {}
    for start, kept, missing in workers.run(RANKS, "tests.mixers.lte.test_retained:found", lengths, room, False):
        begin = max(number for number in starts if number <= start)
        missed[start] = missing
        assert (kept is None) == (start - begin <= window + room)
        if kept is not None:
            wanting[start] = begin
            for numbers, merit in zip(kept, merits(begin), strict=True):
                sinks = [number for number in range(begin, start - window) if merit[number] == torch.inf]
                assert numbers[: len(sinks)] == sinks
                positive = []
                for first in range(0, start, TOKENS):  # a stretch of each rank's, the first `room` best of it
                    stretch = range(max(begin, first - window), max(begin, first + TOKENS - window))
                    left = [number for number in stretch if merit[number] > 0]
                    positive += sorted(left, key=lambda number: -merit[number])[:room]
                assert sorted(numbers) == sorted(positive)
    for first, missing in missed.items():
        begins = {begin for start, begin in wanting.items() if first < start and begin < first + TOKENS}
        for merit, found in zip(merits(min(begins, default=0)), missing, strict=True):
            stretch = range(max([first - window, *begins]), first + TOKENS - window)
            expected = max(0, sum(merit[number] > 0 for number in stretch) - room) if begins else 0
            assert found == expected
