"""How many micro-batches a pipeline rank holds between forward and backward pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from megahybrid.config.schema import ParallelConfig


def in_flight(parallel: ParallelConfig, rank: int, count: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Before every backward pass of a step of `count` micro-batches: which of the rank's chunks it goes through, and
    how many micro-batches each of them holds, that one included.

    Megatron-core's schedules (Narayanan et al., arXiv 2104.04473, section 2.2): a warm-up of forward passes, then one
    forward and one backward pass in turn, then the backward passes that are left. With p ranks, rank r warms up with
    p - r - 1; with v > 1 chunks a rank, with 2 (p - r - 1) + (v - 1) p, where p micro-batches pass the rank's first
    chunk, then its second, and so on, and backward the other way round.
    """
    size, chunks = parallel.pipeline, parallel.virtual_pipeline
    order = [
        chunk
        for first in range(0, count, size)
        for chunk in range(chunks)
        for _ in range(first, min(first + size, count))
    ]
    warm_up = size - rank - 1 if chunks == 1 else 2 * (size - rank - 1) + (chunks - 1) * size
    forwards, held = iter(order), [0] * chunks
    for chunk in itertools.islice(forwards, warm_up):
        held[chunk] += 1
    for number in order:
        for chunk in itertools.islice(forwards, 1):
            held[chunk] += 1
        chunk = chunks - 1 - number
        yield chunk, tuple(held)
        held[chunk] -= 1
