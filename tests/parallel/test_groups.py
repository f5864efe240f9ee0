"""What a process does before it joins a group, and questions to all processes."""

import os
import subprocess
import time

import pytest

from megahybrid.config.schema import ParallelConfig
from megahybrid.parallel import groups
from tools.workers import environment, python


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


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"},
        {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"},
    ],
)
def test_memory_is_taken_in_segments_that_grow_unless_the_user_says_otherwise(given):
    program = (
        "import torch, megahybrid.training.loop; from megahybrid.config.schema import ParallelConfig\n"
        "from megahybrid.parallel import groups; groups.initialize(ParallelConfig())\n"
        "print(torch._C._accelerator_getAllocatorSettings())"
    )
    surroundings = {
        name: value for name, value in environment(**given).items() if "ALLOC_CONF" not in name or name in given
    }
    done = subprocess.run([python(), "-c", program], env=surroundings, capture_output=True, text=True)
    (said,) = given.values() or ["expandable_segments:True"]
    assert done.stdout.split() == [said], done.stderr
