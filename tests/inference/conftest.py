import pytest

from megahybrid.config.schema import ParallelConfig
from megahybrid.parallel import groups


@pytest.fixture(autouse=True)
def process_group():
    """A process group of one, which Megatron-core's layers need."""
    groups.initialize(ParallelConfig())
    yield
    groups.shut_down()
