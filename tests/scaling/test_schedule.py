"""Micro-batches in flight, against Megatron-core's own warm-up and order, and in closed form."""

from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from megahybrid.config.schema import ParallelConfig
from megahybrid.scaling.schedule import in_flight


def replayed(pipeline, virtual, rank, count):
    """What `in_flight` says, from Megatron-core's numbers of passes and its table of (micro-batch, chunk)."""
    group = SimpleNamespace(size=lambda: pipeline, rank=lambda: rank)
    chunks = virtual if virtual > 1 else None
    schedule = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=chunks)
    total, _, warm_up, rest = get_pp_rank_microbatches(count, virtual, pipeline, p2p_communicator=schedule)
    table = get_schedule_table(count, virtual, pipeline)
    passes = ["forward"] * warm_up + ["forward", "backward"] * rest + ["backward"] * warm_up
    assert len(passes) == 2 * total
    alive, seen, done = set(), [], {"forward": 0, "backward": 0}
    for each in passes:
        batch, chunk = table[done[each]]
        done[each] += 1
        if each == "forward":
            alive.add((batch, chunk))
        else:
            chunk = virtual - 1 - chunk
            seen.append((chunk, tuple(sum(held == number for _, held in alive) for number in range(virtual))))
            alive.remove((batch, chunk))
    assert not alive
    return seen


@pytest.mark.parametrize(("pipeline", "virtual"), [(2, 1), (4, 1), (2, 2), (4, 2), (4, 3)])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_the_schedule_is_megatrons(pipeline, virtual, groups):
    parallel = ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual)
    for rank in range(pipeline):
        expected = replayed(pipeline, virtual, rank, groups * pipeline)
        assert list(in_flight(parallel, rank, groups * pipeline)) == expected


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_1f1b_holds_as_many_as_there_are_ranks_behind(count):
    for rank in range(4):
        held = [sum(each) for _, each in in_flight(ParallelConfig(pipeline=4), rank, count)]
        assert max(held) == min(4 - rank, count)
        assert len(held) == count


@pytest.mark.parametrize(("pipeline", "virtual", "count"), [(2, 2, 2), (2, 2, 8), (4, 2, 4), (4, 2, 8), (4, 3, 16)])
def test_the_interleaved_schedule_holds_its_warm_up_and_one(pipeline, virtual, count):
    parallel = ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual)
    for rank in range(pipeline):
        held = [sum(each) for _, each in in_flight(parallel, rank, count)]
        assert max(held) == min(2 * (pipeline - rank - 1) + (virtual - 1) * pipeline + 1, count * virtual)


def test_without_a_pipeline_one_micro_batch_is_held():
    assert list(in_flight(ParallelConfig(), 0, 3)) == [(0, (1,))] * 3
