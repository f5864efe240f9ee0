"""What a process does before it joins a group, and questions to all processes."""

import os
import time

import pytest

from megahybrid.config.schema import ParallelConfig
from megahybrid.parallel import groups


def ask(late: float) -> tuple[bool, bool, float]:
    """In a worker: two questions, to which rank 1 says yes, after a while in which rank 0 is elsewhere."""
    groups.initialize(ParallelConfig())
    rank = int(os.environ["RANK"])
    nobody = groups.some(False)
    if rank == 0:
        time.sleep(late)
    begun = time.monotonic()
    return nobody, groups.some(rank == 1, 1.5 if rank == 1 else None), time.monotonic() - begun


@pytest.mark.parametrize("late", [0.0, 4.0])
def test_a_process_is_not_waited_for_longer_than_asked(late, workers):
    (no, first, _), (nor, second, waited) = workers.run(2, "tests.parallel.test_groups:ask", late)
    assert not no and not nor and first and second
    assert 1.4 < waited < 3.9 if late else waited < 1.4
