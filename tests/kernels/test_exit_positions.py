import pytest
import torch
from oracles_lte import documents, streaming_buffer

from megahybrid_kernels import Sequences
from megahybrid_kernels.exit_positions import NEVER, exit_positions


def tied_scores(tokens: int, heads: int, seed: int, levels: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(levels, (tokens, heads), generator=generator) - levels // 3) / 10


@pytest.mark.parametrize(
    "window_size, sink_size, buffer_size", [(0, 0, 1), (3, 0, 2), (5, 2, 2), (5, 4, 9), (9, 1, 40)]
)
@pytest.mark.parametrize("lengths", [(1,), (2, 1, 70, 33, 5), (97,), (64, 65)])
@pytest.mark.parametrize("levels", [3, 7, 10_000])
def test_equals_the_streaming_buffer(lengths, window_size, sink_size, buffer_size, levels):
    score = tied_scores(sum(lengths), 3, seed=levels, levels=levels)
    exits = exit_positions(score, Sequences.of(lengths), window_size, sink_size, buffer_size)
    assert exits.dtype == torch.int64
    displaced = 0
    for rows in documents(lengths):
        for h in range(3):
            values, actual = score[rows, h].tolist(), exits[rows, h].tolist()
            _, expected = streaming_buffer(values, window_size, sink_size, buffer_size)
            for j, value in enumerate(values):
                if j in expected:
                    assert actual[j] == (NEVER if expected[j] is None else expected[j])
                    displaced += expected[j] is not None
                elif value > 0:
                    assert actual[j] <= j + window_size + 1
                else:
                    assert actual[j] == 0
    assert displaced or levels == 3 or sink_size == buffer_size or max(lengths) <= 2 * buffer_size + window_size


@pytest.mark.parametrize("fill", [-0.1, 0.0, 0.2])
def test_nothing_kept_and_all_equal(fill):
    score = torch.full((50, 2), fill)
    exits = exit_positions(score, Sequences.of([50]), 4, 2, 6)
    kept = 6 if fill > 0 else 2
    assert (exits[:kept] == NEVER).all()
    assert (exits[kept:] <= torch.arange(kept, 50)[:, None] + 5).all()
    if fill <= 0:
        assert (exits[kept:] == 0).all()


def test_packed_equals_separate_and_positions_may_start_late():
    lengths, starts = (40, 7, 61), torch.tensor([0, 100, 3])
    score = tied_scores(108, 2, seed=3)
    whole = exit_positions(score, Sequences.of(lengths, starts=starts), 5, 4, 6)
    for rows, start in zip(documents(lengths), starts, strict=True):
        sequences = Sequences.of([rows.stop - rows.start], starts=start[None])
        assert torch.equal(whole[rows], exit_positions(score[rows], sequences, 5, 4, 6))


def test_refuses_a_buffer_that_cannot_hold_the_sinks():
    with pytest.raises(ValueError, match="sinks"):
        exit_positions(torch.zeros(5, 1), Sequences.of([5]), 2, 4, 3)
